"""Workers of a real deployment are added and retired while streams run: Ray, processes, NIXL, gRPC."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.client.admin import scale
from pdserve.core.errors import InvalidRequest
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming
from tests.e2e.test_restart import Served, ended, free_port, until_every_block_is_back
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray]

Oracle = tuple[Path, PreTrainedModel]
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def scalable(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    config = config_of(
        tiny_oracle[0],
        coordinator={"local_prefill": "never", "policy": "round_robin"},
        planner={"mode": "off", "max_decode": 2},
    )
    with RunningDeployment(config) as running:
        yield running


def decode_workers(running: RunningDeployment, count: int) -> list[pb.ScaleStatus]:
    return list(scale(running.deployment.grpc, decode=count))


def test_decode_workers_are_added_and_retired_under_running_streams_with_the_same_tokens(
    scalable: RunningDeployment, tiny_oracle: Oracle
) -> None:
    prompts = [prompt_of(80 + seed, seed=seed) for seed in range(5)]
    streams = [Streaming(scalable, prompt, NUM_TOKENS) for prompt in prompts[:2]]
    for stream in streams:
        stream.wait_for_tokens(5)
    told = decode_workers(scalable, 2)
    assert (told[-1].prefill, told[-1].decode, told[-1].done) == (1, 2, True)
    assert {change.state for status in told for change in status.changes} >= {"starting", "done"}
    late = [Streaming(scalable, prompt, NUM_TOKENS) for prompt in prompts[2:]]
    for stream in late:
        stream.wait_for_tokens(5)
    added = scalable.worker("decode-1")
    assert added is not None
    assert added.placed > 0
    told = decode_workers(scalable, 1)
    assert (told[-1].prefill, told[-1].decode, told[-1].done) == (1, 1, True)
    for stream, prompt in zip([*streams, *late], prompts, strict=True):
        stream.end()
        assert stream.error is None
        assert stream.tokens == greedy(tiny_oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert stream.attempts == 1
    names = [worker.id for worker in scalable.snapshot().workers]
    assert len(names) == 2
    assert scalable.pid("prefill-0")
    scalable.wait_until("every block back", scalable.idle)


def test_more_than_the_limits_allow_is_refused_at_once(scalable: RunningDeployment) -> None:
    with pytest.raises(InvalidRequest, match="max_decode is 2"):
        decode_workers(scalable, 3)


@pytest.mark.slow
def test_where_there_is_no_room_for_a_worker_that_is_said_at_once(scalable: RunningDeployment) -> None:
    """A machine of our own has the cores it has: one for each worker that there may be."""
    told = list(scale(scalable.deployment.grpc, prefill=2, decode=2))
    (failed,) = [change for change in told[-1].changes if change.state == "failed"]
    assert "fit nowhere" in failed.text
    assert told[-1].prefill + told[-1].decode == 3
    decode_workers(scalable, 1)
    list(scale(scalable.deployment.grpc, prefill=1))


@pytest.mark.slow
def test_the_next_serve_has_the_workers_that_there_were_and_not_those_of_the_configuration(
    tiny_oracle: Oracle, tmp_path: Path
) -> None:
    """It is killed after decode-1 was retired and decode-2 added, and while decode-3 starts."""
    port, growing = free_port(), ["planner.max_decode=3", "planner.mode=off"]
    first = Served(tiny_oracle[0], port, tmp_path / "first.log", linger_s=60, more=growing)
    with ended(first.process):
        first.until_ready()
        for count in (2, 1, 2):
            list(scale(first.grpc, decode=count))
        for told in scale(first.grpc, decode=3):
            if any(change.state == "starting" for change in told.changes):
                break
        first.process.kill()
        first.process.wait()
        again = Served(tiny_oracle[0], port, tmp_path / "again.log", linger_s=60, more=growing)
        with ended(again.process):
            again.until_ready()
            assert "taking over" in again.said()
            prompt = prompt_of(60, seed=3)
            with again.client() as client:
                answer = client.generate(prompt_token_ids=prompt, max_tokens=8, temperature=0.0)
            assert list(answer.token_ids) == greedy(tiny_oracle[1], prompt, 8)
            up = set(re.findall(r'pdserve_worker_up{[^}]*worker="([^"]+)"[^}]*} 1', again.metrics()))
            # Whether decode-3 had a process yet is not known.
            assert up - {"decode-3"} == {"prefill-0", "decode-0", "decode-2"}
            told = list(scale(again.grpc, decode=1))
            assert (told[-1].prefill, told[-1].decode) == (1, 1)
            until_every_block_is_back(again)
            again.process.send_signal(signal.SIGTERM)
            assert again.process.wait(60) == 0, again.said()
