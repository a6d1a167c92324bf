"""A drain of a real deployment: processes, NIXL, gRPC. Streams go on at another worker with their KV."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.client.admin import drain
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming
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
