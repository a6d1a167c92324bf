"""A real Prometheus scrapes a real cluster under load, and every panel of every dashboard has data."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.core.config import ServeConfig
from pdserve.core.errors import PdServeError
from tests.support.paths import REPO
from tests.support.tools import load_tool
from tests.support.whole_cluster import RunningDeployment, make_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
_LOAD_S = 150.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[str]:
    """Our own configuration, but for the port."""
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("prometheus is not installed")
    for path in (REPO / "deploy" / "prometheus").iterdir():
        (folder / path.name).write_text(path.read_text().replace(":9464", f":{metrics_port}"))
    port = free_port()
    process = subprocess.Popen(
        [
            found,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


class Load:
    """Requests of several tenants and classes, and everything that can go wrong with one, over and over."""

    def __init__(self, running: RunningDeployment) -> None:
        self._running, self._over = running, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)] + [
            threading.Thread(target=self._misbehave)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()

    def _ask(self, number: int) -> None:
        with self._running.client() as client:
            count = 0
            while not self._over.is_set():
                count += 1
                prompt = "once upon a time " * (2 + count % 4)
                with contextlib.suppress(PdServeError):
                    client.generate(
                        prompt,
                        max_tokens=24,
                        ignore_eos=True,
                        tenant=f"tenant-{number}",
                        sla_class=("interactive", "batch")[number % 2],
                        ttft_target_ms=200.0,
                        tpot_target_ms=50.0,
                    )

    def _misbehave(self) -> None:
        with self._running.client() as client:
            while not self._over.wait(1.0):
                with contextlib.suppress(PdServeError):
                    client.generate("more than it may", max_tokens=4, n=2, tenant="limited")
                with contextlib.suppress(PdServeError):
                    client.generate("no such temperature", temperature=-1.0)
                with contextlib.suppress(PdServeError):
                    list(client.stream("too long for its deadline", max_tokens=400, deadline_s=0.2))
                with contextlib.suppress(PdServeError):  # eats the pool
                    client.generate("y" * 500, max_tokens=100, n=4, ignore_eos=True, deadline_s=4.0)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_every_panel_of_every_dashboard_has_data(tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny"
    checkpoint.mkdir()
    make_tiny_checkpoint(checkpoint)
    config = ServeConfig.model_validate(
        {
            "model": {"model": str(checkpoint), "served_model_name": "tiny", "dtype": "float32"},
            "cache": {"block_size": 16, "num_blocks": 64},
            "coordinator": {"port": 0, "policy": "sla", "tenants": {"limited": {"max_concurrent": 1}}},
            "cluster": {"dashboard": True, "dashboard_port": free_port(), "linger_s": 0},
            "cost": {"device_hour": 2.5, "kv_gib_hour": 0.1},
        }
    )
    with RunningDeployment(config) as running, prometheus(tmp_path, running.deployment.metrics_port) as url:
        load = Load(running)
        try:
            os.kill(running.pid("decode-0"), signal.SIGKILL)
            missing = data_within(url, _LOAD_S)
        finally:
            load.stop()
    assert not missing, "\n".join(missing)


def data_within(url: str, limit_s: float) -> list[str]:
    """Panels that have had no data by then. Nothing tells when a scrape has come, so it asks again."""
    check = load_tool("check_dashboards")
    deadline = time.monotonic() + limit_s
    missing = ["Prometheus did not answer"]
    while missing and time.monotonic() < deadline:
        time.sleep(3.0)
        with contextlib.suppress(ConnectionError):
            missing = check.without_data(url)
    return missing
