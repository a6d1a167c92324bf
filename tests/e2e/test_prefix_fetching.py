"""The beginning of a prompt comes from the worker that has it, over NIXL; and when that worker dies."""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedModel

from coordinator import fetching
from pdserve.client import Completion
from pdserve.core.ids import WorkerId
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming, epoch_of, require_gone
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray]

Oracle = tuple[Path, PreTrainedModel]
LENGTH = 1600
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def two(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    """Workers in turn, so that the second time a prompt is asked, it is asked of one that lacks it.

    This model reads a prompt sooner than two messages go to and fro: it is taken to be a slow one.
    """
    config = config_of(
        tiny_oracle[0],
        prefill={"workers": 0},
        decode={"workers": 2},
        coordinator={"policy": "round_robin", "fetch_prefixes": True},
    )
    with pytest.MonkeyPatch.context() as patch, RunningDeployment(config) as running:
        patch.setattr(fetching, "time_to_read_s", lambda *_: 60.0)
        for _ in range(2):
            ask(running, prompt_of(300))  # they meet
        running.wait_until("the pair is measured", lambda: met(running))
        yield running


def met(running: RunningDeployment) -> bool:
    beats = [worker.heartbeat for worker in running.snapshot().workers]
    return all(beat is not None and any(pair.bytes_per_s for pair in beat.pairs) for beat in beats)


def ask(running: RunningDeployment, prompt: list[int]) -> Completion:
    with running.client() as client:
        return client.generate(
            prompt_token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
        )


def scraped(running: RunningDeployment) -> dict[str, float]:
    """By name and the label that is not the model."""
    url = f"http://127.0.0.1:{running.deployment.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    return {
        f"{sample.name} {sample.labels.get('outcome') or sample.labels.get('path')}": sample.value
        for family in families
        if family.name.startswith("pdserve_prefix_fetch")
        for sample in family.samples
    }


def test_what_a_worker_lacks_is_pushed_to_it_and_the_tokens_are_the_same(
    two: RunningDeployment, tiny_oracle: Oracle
) -> None:
    prompt = prompt_of(LENGTH, seed=100)
    wanted = greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
    first, second = ask(two, prompt), ask(two, prompt)
    assert list(first.token_ids) == list(second.token_ids) == wanted
    assert first.timings.decode_worker != second.timings.decode_worker
    assert second.usage.cached_prompt_tokens == (LENGTH - 1) // 16 * 16
    two.wait_until("the metric counts it", lambda: scraped(two)["pdserve_prefix_fetches_total arrived"] == 1)
    sizes = {name: value for name, value in scraped(two).items() if "bytes_total" in name}
    assert sum(sizes.values()) == (LENGTH - 1) // 16 * 16 * 4 * 2 * 2 * 8 * 4
    two.wait_until("every block back", two.idle)


def test_where_the_holder_dies_before_its_push_has_ended_the_prompt_is_read(
    two: RunningDeployment, tiny_oracle: Oracle
) -> None:
    prompt = prompt_of(LENGTH, seed=200)
    holder = ask(two, prompt).timings.decode_worker
    epoch, pid = epoch_of(two, holder), two.pid(WorkerId(holder))
    two.wait_until("nothing under way", two.idle)
    os.kill(pid, signal.SIGSTOP)
    stream = Streaming(two, prompt, NUM_TOKENS)
    two.wait_until("the push is ordered", lambda: two.snapshot().unsettled == 1)
    assert not stream.tokens
    os.kill(pid, signal.SIGKILL)
    stream.end()
    require_gone(pid)
    assert stream.error is None
    assert stream.tokens == greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
    assert stream.attempts == 1
    two.wait_until("the metric counts it", lambda: scraped(two)["pdserve_prefix_fetches_total lost"] == 1)

    def back() -> bool:
        now = two.worker(holder)
        return now is not None and now.up and now.epoch > epoch

    two.wait_until(f"{holder} is back", back)
    two.wait_until("every block back", two.idle)
