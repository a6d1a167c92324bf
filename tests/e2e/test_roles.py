"""Workers of a real deployment take up another role and go back, while streams run: processes, NIXL, gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from coordinator.events import ChangeWorkerRole
from pdserve.client import Completion
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray]

Oracle = tuple[Path, PreTrainedModel]
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def three(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    config = config_of(
        tiny_oracle[0], decode={"workers": 2}, coordinator={"local_prefill": "never", "policy": "round_robin"}
    )
    with RunningDeployment(config) as running:
        yield running


def change_role(running: RunningDeployment, worker: str, role: Role) -> None:
    event = ChangeWorkerRole(worker=WorkerId(worker), role=role)
    running.on_loop(lambda: running.deployment.coordinator.handle(event))

    def changed() -> bool:
        state = running.worker(worker)
        return state is not None and state.role is role and not state.draining

    running.wait_until(f"{worker} is a {role.value} worker", changed)


def ask(running: RunningDeployment, prompt: list[int]) -> Completion:
    with running.client() as client:
        return client.generate(prompt_token_ids=prompt, max_tokens=8, temperature=0.0, ignore_eos=True)


def test_a_worker_flips_there_and_back_under_running_streams_with_the_same_tokens(
    three: RunningDeployment, tiny_oracle: Oracle
) -> None:
    prompts = [prompt_of(100 + seed, seed=seed) for seed in range(4)]
    streams = [Streaming(three, prompt, NUM_TOKENS) for prompt in prompts]
    for stream in streams:
        stream.wait_for_tokens(5)
    state = three.worker("decode-1")
    assert state is not None
    assert state.placed > 0
    change_role(three, "decode-1", Role.PREFILL)
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.end()
        assert stream.error is None
        assert stream.tokens == greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert stream.attempts == 1
    readers, writers = set(), set()
    for seed in range(4):
        prompt = prompt_of(80, seed=50 + seed)
        answer = ask(three, prompt)
        assert list(answer.token_ids) == greedy(tiny_oracle[1], prompt, 8, ignore_eos=True)
        readers.add(answer.timings.prefill_worker)
        writers.add(answer.timings.decode_worker)
    assert "decode-1" in readers
    assert writers == {"decode-0"}
    change_role(three, "decode-1", Role.DECODE)
    seen = set()
    for seed in range(4):
        prompt = prompt_of(60, seed=90 + seed)
        answer = ask(three, prompt)
        assert list(answer.token_ids) == greedy(tiny_oracle[1], prompt, 8, ignore_eos=True)
        assert answer.timings.prefill_worker == "prefill-0"
        seen.add(answer.timings.decode_worker)
    assert seen == {"decode-0", "decode-1"}
    three.wait_until("every block back", three.idle)
