"""`pdserve serve` itself, struck in each phase of a request: killed, stopped, told to end."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel

from pdserve.core.lifecycle import Phase
from tests.e2e.test_chaos import PHASES
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming, require_gone
from tests.e2e.test_restart import Served, actors_of, free_port, until_every_block_is_back, until_gone
from tests.support.whole_cluster import greedy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Oracle = tuple[Path, PreTrainedModel]
NUM_TOKENS = 60
TYPED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")


class Struck:
    """One address, served by one process after another."""

    def __init__(self, oracle: Oracle, folder: Path) -> None:
        self.oracle, self._folder, self._port = oracle, folder, free_port()
        self._order, self._count = folder / "order", 0
        self._seeds = itertools.count(1000)
        """Of prompts: nothing of them is in a worker's cache."""
        self._processes = ExitStack()
        try:
            self.serve()
        except BaseException:
            self._processes.close()
            raise

    def serve(self) -> None:
        """A new process, which takes over what the one before left."""
        self._count += 1
        log = self._folder / f"{self._count}.log"
        self.now = Served(self.oracle[0], self._port, log, linger_s=60, strike=self._order)
        self._processes.callback(self.now.process.wait)
        self._processes.callback(self.now.process.kill)
        self.now.until_ready()

    def strike(self, phase: Phase, number: signal.Signals) -> list[tuple[Streaming, list[int]]]:
        """Ask, until the signal has been sent in that phase: one may pass by a request.

        KV that is heard to have arrived before its prompt is heard to have been read was never on the way.
        """
        written = self._order.with_suffix(".new")
        written.write_text(f"{phase} {int(number)}")
        written.replace(self._order)  # whole at once: it is looked at with every event
        streams: list[tuple[Streaming, list[int]]] = []
        deadline = time.monotonic() + 60
        while self._order.exists():
            assert time.monotonic() < deadline, f"no request was ever {phase}: {self.now.said()}"
            if not any(stream.running for stream, _ in streams):
                prompts = [prompt_of(length, seed=next(self._seeds)) for length in (17, 1500)]
                streams += [(Streaming(self.now, prompt, NUM_TOKENS), prompt) for prompt in prompts]
            time.sleep(0.01)
        return streams

    def until_stopped(self) -> None:
        process, deadline = psutil.Process(self.now.process.pid), time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, process.status()
            time.sleep(0.01)

    def kill(self) -> None:
        self.now.process.kill()
        self.now.process.wait()
        require_gone(self.now.process.pid)

    def require_right(self, streams: list[tuple[Streaming, list[int]]], *, whole: bool) -> None:
        """Right as far as they go; where not whole, a typed error says so."""
        for stream, prompt in streams:
            stream.end()
            expected = greedy(self.oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
            assert stream.tokens == expected[: len(stream.tokens)]
            if stream.error is None:
                assert len(stream.tokens) == NUM_TOKENS
            else:
                assert not whole, stream.error
                assert stream.error.code in TYPED, stream.error

    def require_next(self, seed: int) -> None:
        """The next request works, and every block comes back."""
        prompt = prompt_of(50, seed)
        with self.now.client() as client:
            completion = client.generate(prompt_token_ids=prompt, max_tokens=8, temperature=0.0)
        assert list(completion.token_ids) == greedy(self.oracle[1], prompt, 8)
        until_every_block_is_back(self.now)

    def close(self) -> None:
        if self.now.process.poll() is None:
            self.now.process.send_signal(signal.SIGCONT)
            self.now.process.send_signal(signal.SIGTERM)
            self.now.process.wait(60)
        self._processes.close()


@pytest.fixture(scope="module")
def struck(tiny_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    struck = Struck(tiny_oracle, tmp_path_factory.mktemp("struck"))
    yield struck
    struck.close()


@pytest.mark.parametrize("phase", [str(phase) for phase in PHASES])
def test_one_that_is_stopped_for_a_while_goes_on_with_every_stream(struck: Struck, phase: str) -> None:
    streams = struck.strike(Phase(phase), signal.SIGSTOP)
    struck.until_stopped()
    struck.now.process.send_signal(signal.SIGCONT)
    struck.require_right(streams, whole=True)
    struck.require_next(seed=1)


@pytest.mark.parametrize("stopped_first", [False, True], ids=["killed", "stopped, then killed"])
@pytest.mark.parametrize("phase", [str(phase) for phase in PHASES])
def test_after_one_that_was_killed_the_next_takes_its_workers_over(
    struck: Struck, phase: str, stopped_first: bool
) -> None:
    before = actors_of(struck.now.process.pid) if struck.now.process.poll() is None else {}
    streams = struck.strike(Phase(phase), signal.SIGSTOP if stopped_first else signal.SIGKILL)
    if stopped_first:
        struck.until_stopped()
    struck.kill()
    struck.require_right(streams, whole=False)
    struck.serve()
    assert "taking over" in struck.now.said()
    assert all(worker.is_running() for worker in before.values())
    struck.require_next(seed=2)


@pytest.mark.parametrize("phase", [str(phase) for phase in PHASES])
def test_one_that_is_told_to_end_finishes_what_it_has_and_leaves_nothing(
    tiny_oracle: Oracle, tmp_path: Path, phase: str
) -> None:
    struck = Struck(tiny_oracle, tmp_path)
    workers = actors_of(struck.now.process.pid)
    streams = struck.strike(Phase(phase), signal.SIGTERM)
    struck.require_right(streams, whole=False)
    assert struck.now.process.wait(60) == 0, struck.now.said()
    until_gone(workers.values())
    struck.close()
