"""`pdserve logs` finds the lines of a request on every machine of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(240)]
_START_S = 90
_WORKERS = """
import logging, sys
import ray
from pdserve.core.logs import about, log_worker
from pdserve.core.operation_settings import LoggingSettings

class Worker:
    def __init__(self, name):
        log_worker(LoggingSettings(), name)

    def take(self, request):
        logging.getLogger("pdserve.request").info("took it", extra=about(request))

ray.init(sys.argv[1], log_to_driver=False)
for name in ("prefill-0", "decode-0"):
    worker = ray.remote(Worker).options(resources={name: 1}, num_cpus=0).remote(name)
    ray.get([worker.take.remote(request) for request in ("r-1", "r-2")])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def node(folder: Path, resource: str, *arguments: str) -> Iterator[None]:
    """A Ray node with a folder of its own, as on another machine; `--block`: it ends with its starter."""
    folder.mkdir()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--temp-dir", str(folder)]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=80000000"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f'--resources={{"{resource}": 1}}']
    with (folder / "start.txt").open("w") as said:
        process = subprocess.Popen([*command, *arguments], stdout=said, stderr=said, env=environment())
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def environment() -> dict[str, str]:
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{REPO}"}
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | wanted


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(), capture_output=True, text=True, timeout=_START_S
    )


@contextlib.contextmanager
def two_nodes() -> Iterator[str]:
    """The head's address."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # paths of sockets have a limit that pytest's folders exceed
    address = f"127.0.0.1:{free_port()}"
    port, dashboard = address.partition(":")[2], free_port()
    head = ("--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}")
    try:
        with (
            node(folder / "a", "prefill-0", *head, f"--ray-client-server-port={free_port()}"),
            node(folder / "b", "decode-0", f"--address={address}"),
        ):
            yield address
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_lines_on_other_machines_are_found_through_ray() -> None:
    with two_nodes() as address:
        started = run("-c", _WORKERS, address)
        assert started.returncode == 0, started.stderr
        shown = run("-m", "pdserve.cli", "logs", "r-1", "--cluster", address)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert ["prefill-0" in lines[0], "decode-0" in lines[1]] == [True, True], lines
        assert all("request=r-1 took it" in line for line in lines)
        assert len(lines) == 2
        unknown = run("-m", "pdserve.cli", "logs", "r-9", "--cluster", address)
        assert unknown.returncode == 1
        assert "no line about r-9" in unknown.stderr


def test_a_cluster_that_does_not_answer_is_said() -> None:
    shown = run("-m", "pdserve.cli", "logs", "r-1", "--cluster", f"127.0.0.1:{free_port()}")
    assert shown.returncode == 2
    assert "no Ray cluster answers" in shown.stderr
