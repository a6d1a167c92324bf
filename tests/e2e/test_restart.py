"""`pdserve serve` is killed while it streams: workers live on, and the next one takes them over."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import pytest
from transformers import PreTrainedModel

from pdserve.client import Client
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming, has_ended, require_gone
from tests.support.paths import REPO
from tests.support.whole_cluster import greedy

pytestmark = pytest.mark.ray

Oracle = tuple[Path, PreTrainedModel]
READY_S: Final = 120.0


class Served:
    """One `pdserve serve` process."""

    def __init__(
        self,
        checkpoint: Path,
        port: int,
        log: Path,
        *,
        linger_s: float,
        strike: Path | None = None,
        more: Sequence[str] = (),
    ) -> None:
        """strike: as `tests.support.struck_serve` takes it. more: settings, as `key=value`."""
        settings = ["cache.num_blocks=512", "cache.block_size=16", "cluster.heartbeat_s=0.1", *more]
        settings.append(f"cluster.linger_s={linger_s}")
        options = [word for setting in settings for word in ("--set", setting)]
        self.grpc, self._log = f"127.0.0.1:{port}", log
        if strike is not None:  # or there might be no transfer to strike in
            options += [
                "--set",
                "coordinator.local_prefill=never",
                "--set",
                "coordinator.whole_on_prefill=never",
            ]
        program = ["pdserve.cli"] if strike is None else ["tests.support.struck_serve", str(strike)]
        command = [sys.executable, "-m", *program, "serve", "--model", str(checkpoint)]
        command += ["--port", str(port), "--dtype", "float32", "--no-dashboard", *options]
        with log.open("w") as said:
            self.process = subprocess.Popen(command, stderr=said, cwd=REPO)

    def said(self) -> str:
        return self._log.read_text()

    def until_ready(self) -> None:
        """Its standard error goes to a file, for it must not be a pipe that it shares: look there."""
        deadline = time.monotonic() + READY_S
        while "gRPC" not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def client(self) -> Client:
        return Client(self.grpc, timeout_s=120)

    def metrics(self) -> str:
        found = re.search(r"http://(\S+)/metrics", self.said())
        assert found is not None
        with urllib.request.urlopen(found[0]) as answer:
            text: str = answer.read().decode()
        return text


def actors_of(process: int) -> dict[str, psutil.Process]:
    """The worker processes in the same tree, by the name of their actor."""
    found = {}
    for child in psutil.Process(process).children(recursive=True):
        title = " ".join(child.cmdline())
        for name in ("PrefillActor", "DecodeActor", "pdserve.cluster.keeper"):
            if name in title:
                found[name] = child
    return found


@contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_next_serve_takes_over_the_workers_that_a_killed_one_left(
    tiny_oracle: Oracle, tmp_path: Path
) -> None:
    port = free_port()
    first = Served(tiny_oracle[0], port, tmp_path / "first.log", linger_s=60)
    with ended(first.process):
        first.until_ready()
        before = actors_of(first.process.pid)
        assert before.keys() == {"PrefillActor", "DecodeActor", "pdserve.cluster.keeper"}
        prompts = [prompt_of(40, seed=1), prompt_of(900, seed=2)]
        writing = Streaming(first, prompts[0], 1000)
        writing.wait_for_tokens(5)
        reading = Streaming(first, prompts[1], 100)
        first.process.kill()
        first.process.wait()
        require_gone(first.process.pid)
        for stream, prompt in zip((writing, reading), prompts, strict=True):
            stream.end()
            assert stream.error is not None
            assert stream.error.code == "UNAVAILABLE"
            count = len(stream.tokens)
            assert not count or stream.tokens == greedy(tiny_oracle[1], prompt, count, ignore_eos=True)

        again = Served(tiny_oracle[0], port, tmp_path / "again.log", linger_s=60)
        with ended(again.process):
            again.until_ready()
            assert "taking over" in again.said()
            assert {name: process.is_running() for name, process in before.items()} == dict.fromkeys(
                before, True
            )
            for prompt in prompts:
                with again.client() as client:
                    completion = client.generate(prompt_token_ids=prompt, max_tokens=8, temperature=0.0)
                assert list(completion.token_ids) == greedy(tiny_oracle[1], prompt, 8)
            until_every_block_is_back(again)
            again.process.send_signal(signal.SIGTERM)
            assert again.process.wait(60) == 0, again.said()
            until_gone(before.values())


@pytest.mark.slow
def test_workers_end_by_themselves_when_no_serve_comes_back(tiny_oracle: Oracle, tmp_path: Path) -> None:
    served = Served(tiny_oracle[0], free_port(), tmp_path / "serve.log", linger_s=0.5)
    with ended(served.process):
        served.until_ready()
        left = psutil.Process(served.process.pid).children(recursive=True)
        (run_dir,) = {
            Path(found)
            for child in left
            for found in re.findall(r"/tmp/pdserve-[^/\s]+", " ".join(child.cmdline()))
        }
        served.process.kill()
        served.process.wait()
        until_gone(left)
        assert not run_dir.exists()


def until_gone(processes: Iterable[psutil.Process]) -> None:
    """They are not our children: nothing tells us."""
    deadline = time.monotonic() + 30
    while alive := [process for process in processes if not has_ended(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def until_every_block_is_back(served: Served) -> None:
    """By what the workers said last: nothing in another process tells us when to look."""
    deadline = time.monotonic() + 30
    while True:
        lines = [
            line
            for line in served.metrics().splitlines()
            if "blocks" in line and re.search(r'state="(held|quarantined)"', line)
        ]
        if lines and all(float(line.rpartition(" ")[2]) == 0 for line in lines):
            return
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
