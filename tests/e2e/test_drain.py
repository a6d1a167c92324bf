"""A drain of a real deployment: processes, NIXL, gRPC. Streams go on at another worker with their KV."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.client.admin import drain
from pdserve.core.messages import Heartbeat, Role
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming, epoch_of, require_gone
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray]

Oracle = tuple[Path, PreTrainedModel]
NUM_TOKENS = 500


@pytest.fixture(scope="module")
def pair(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    with RunningDeployment(config_of(tiny_oracle[0], decode={"workers": 2})) as running:
        yield running


def test_a_drained_decode_worker_is_left_with_the_same_tokens_and_without_a_new_attempt(
    pair: RunningDeployment, tiny_oracle: Oracle
) -> None:
    prompts = [prompt_of(100 + seed, seed=seed) for seed in range(4)]
    streams = [Streaming(pair, prompt, NUM_TOKENS) for prompt in prompts]
    for stream in streams:
        stream.wait_for_tokens(5)
    state = pair.worker("decode-0")
    assert state is not None
    assert state.placed > 0
    statuses = list(drain(pair.deployment.grpc, "decode-0", timeout_s=60.0))
    assert statuses[-1].drained
    still_writing = [len(stream.tokens) < NUM_TOKENS for stream in streams]
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.end()
        assert stream.error is None
        assert stream.tokens == greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert stream.attempts == 1
    assert any(still_writing), "the drain outlasted every stream, so nothing had to move"
    pair.wait_until("every block back", pair.idle)


def test_a_worker_that_was_drained_and_ended_comes_back_into_use(pair: RunningDeployment) -> None:
    state = pair.worker("decode-0")
    assert state is not None
    assert state.draining
    os.kill(pair.pid("decode-0"), signal.SIGKILL)

    def back() -> bool:
        now = pair.worker("decode-0")
        return now is not None and now.up and now.epoch > state.epoch and not now.draining

    pair.wait_until("decode-0 is back", back)


def test_a_worker_that_is_told_to_end_hands_its_streams_over_without_reading_anything_again(
    pair: RunningDeployment, tiny_oracle: Oracle
) -> None:
    """SIGTERM, as from an operator or from a machine that shuts down."""
    prompts = [prompt_of(200 + seed, seed=seed) for seed in range(2)]
    streams = [Streaming(pair, prompt, NUM_TOKENS) for prompt in prompts]
    for stream in streams:
        stream.wait_for_tokens(5)
    hear_from(pair, "prefill-0")
    read = tokens_computed(pair, "prefill-0")
    placed = {worker.id: worker.placed for worker in pair.snapshot().workers if worker.role is Role.DECODE}
    victim = max(placed, key=lambda worker: placed[worker])
    epoch, pid = epoch_of(pair, victim), pair.pid(victim)
    (target,) = placed.keys() - {victim}
    written_before = tokens_computed(pair, target)
    os.kill(pid, signal.SIGTERM)
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.end()
        assert stream.error is None
        assert stream.tokens == greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert stream.attempts == 1
    hear_from(pair, "prefill-0")
    assert tokens_computed(pair, "prefill-0") == read, "a prompt was read again"
    hear_from(pair, target)
    written = tokens_computed(pair, target) - written_before
    assert 0 < written <= len(prompts) * NUM_TOKENS, "a prompt was read again"

    def back() -> bool:
        now = pair.worker(victim)
        return now is not None and now.up and now.epoch > epoch and not now.draining

    pair.wait_until(f"{victim} is back", back)
    require_gone(pid)
    pair.wait_until("every block back", pair.idle)


def hear_from(running: RunningDeployment, worker: str) -> None:
    """Wait for two heartbeats: the second was made after this was called."""
    for _ in range(2):
        before = running.worker(worker)
        assert before is not None
        last = before.heartbeat

        def heard(last: Heartbeat | None = last) -> bool:
            now = running.worker(worker)
            return now is not None and now.heartbeat is not last

        running.wait_until(f"{worker} has said how it is", heard)


def tokens_computed(running: RunningDeployment, worker: str) -> int:
    """By its last heartbeat."""
    state = running.worker(worker)
    assert state is not None
    assert state.heartbeat is not None
    return state.heartbeat.tokens_computed
