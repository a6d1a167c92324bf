"""Workers killed and stopped while they work: a stream goes on or ends typed, and the next one works."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import psutil
import pytest
from transformers import PreTrainedModel

from pdserve.client import Client
from pdserve.core.errors import PdServeError
from pdserve.core.lifecycle import Phase
from tests.e2e.test_disaggregated import prompt_of
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("conserved")]

Oracle = tuple[Path, PreTrainedModel]


class Serving(Protocol):
    """What answers."""

    def client(self) -> Client: ...


class Streaming:
    """One request on a thread of its own: its tokens so far, and how it ended."""

    def __init__(self, running: Serving, prompt: list[int], max_tokens: int) -> None:
        self.tokens: list[int] = []
        self.attempts = 0
        self.error: PdServeError | None = None
        self._first: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(running, prompt, max_tokens))
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_for_tokens(self, count: int) -> None:
        for _ in range(count):
            self._first.get(timeout=60)

    def end(self) -> None:
        self._thread.join(90)
        assert not self._thread.is_alive(), "the stream hangs"

    def _run(self, running: Serving, prompt: list[int], max_tokens: int) -> None:
        try:
            with running.client() as client:
                for delta in client.stream(
                    prompt_token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
                ):
                    self.tokens += delta.token_ids
                    if delta.timings is not None:
                        self.attempts = delta.timings.attempts
                    self._first.put(None)
        except PdServeError as error:
            self.error = error


def require_gone(pid: int) -> None:
    """The fault has really happened."""
    try:
        assert has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return


def has_ended(process: psutil.Process) -> bool:
    """Also where its parent, or whoever took it over, has not reaped it yet: psutil calls that running."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def require_recovered(running: RunningDeployment, worker: str, epoch: int, oracle: Oracle) -> None:
    """The worker is back under a higher epoch, and a new request is right."""

    def back() -> bool:
        state = running.worker(worker)
        return state is not None and state.up and state.epoch > epoch

    running.wait_until(f"{worker} is back", back)
    with running.client() as client:
        completion = client.generate(prompt_token_ids=prompt_of(50), max_tokens=8, temperature=0.0)
    assert list(completion.token_ids) == greedy(oracle[1], prompt_of(50), 8)
    assert completion.timings.prefill_worker == "prefill-0"


def ended_well(stream: Streaming, oracle: Oracle, prompt: list[int], count: int) -> None:
    """Complete and right, or a typed error after a right beginning."""
    stream.end()
    expected = greedy(oracle[1], prompt, count, ignore_eos=True)
    assert stream.tokens == expected[: len(stream.tokens)]
    if stream.error is None:
        assert len(stream.tokens) == count
        assert stream.attempts > 1
    else:
        assert stream.error.code in ("UNAVAILABLE", "DATA_LOSS")


def epoch_of(running: RunningDeployment, worker: str) -> int:
    state = running.worker(worker)
    assert state is not None
    return state.epoch


def test_a_killed_prefill_worker_costs_its_request_a_retry(
    tiny: RunningDeployment, tiny_oracle: Oracle
) -> None:
    pid, epoch, prompt = tiny.pid("prefill-0"), epoch_of(tiny, "prefill-0"), prompt_of(1900)
    stream = Streaming(tiny, prompt, 16)
    tiny.wait_until("the prompt is being read", lambda: tiny.snapshot().phases.get(Phase.PREFILLING))
    os.kill(pid, signal.SIGKILL)
    ended_well(stream, tiny_oracle, prompt, 16)
    require_gone(pid)
    require_recovered(tiny, "prefill-0", epoch, tiny_oracle)


def test_a_killed_decode_worker_costs_its_request_a_retry(
    tiny: RunningDeployment, tiny_oracle: Oracle
) -> None:
    pid, epoch, prompt = tiny.pid("decode-0"), epoch_of(tiny, "decode-0"), prompt_of(100)
    stream = Streaming(tiny, prompt, 800)
    stream.wait_for_tokens(5)
    os.kill(pid, signal.SIGKILL)
    ended_well(stream, tiny_oracle, prompt, 800)
    require_gone(pid)
    require_recovered(tiny, "decode-0", epoch, tiny_oracle)


def test_a_stopped_decode_worker_is_replaced_though_its_process_lived(
    tiny: RunningDeployment, tiny_oracle: Oracle
) -> None:
    pid, epoch, prompt = tiny.pid("decode-0"), epoch_of(tiny, "decode-0"), prompt_of(100, seed=2)
    stream = Streaming(tiny, prompt, 800)
    stream.wait_for_tokens(5)
    os.kill(pid, signal.SIGSTOP)
    tiny.wait_until("it is stopped", lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    ended_well(stream, tiny_oracle, prompt, 800)
    require_recovered(tiny, "decode-0", epoch, tiny_oracle)
    require_gone(pid)
