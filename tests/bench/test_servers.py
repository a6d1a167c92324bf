"""Servers that a run starts: asked, measured, frozen and ended."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdserve.bench.report.write import write_report
from pdserve.bench.scenario import Protocol, Scenario, SystemSpec
from pdserve.bench.servers import serve_command, serving
from pdserve.bench.suite import Run, run_suite
from pdserve.core.errors import ConfigError, WorkerLost
from tests.support.whole_cluster import make_tiny_checkpoint


class Silent:
    def say(self, text: str) -> None: ...
    def trial_began(self, system: str, rate: float, num_requests: int) -> None: ...
    def progressed(self, system: str, progress: object) -> None: ...
    def trial_ended(self, trial: object) -> None: ...


def test_the_command_is_what_a_user_would_type() -> None:
    spec = SystemSpec(name="x", model="m", prefill=2, decode=1, settings=("decode.max_num_seqs=8",))
    words = " ".join(serve_command(spec, 1234)[1:])
    assert words == (
        "-m pdserve.cli serve --port 1234 --no-dashboard --prefill 2 --decode 1 --model m "
        "--set decode.max_num_seqs=8"
    )


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(SystemSpec(name="x", model="/no/such/model"), tmp_path):
            raise AssertionError("it started")

    with pytest.raises(WorkerLost, match="/no/such/model"):
        asyncio.run(main())


SERVER = """
import http.server, json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": "m", "child": child.pid}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Models).serve_forever()
"""


def commanded(port: int, *command: str) -> SystemSpec:
    return SystemSpec(
        name="theirs",
        command=(sys.executable, "-c", *command),
        address=f"http://127.0.0.1:{port}",
        protocol=Protocol.OPENAI,
        freeze=True,
    )


def test_a_server_of_a_command_is_frozen_with_all_below_it_and_ended_in_the_end(tmp_path: Path) -> None:
    port = _free_port()

    async def main() -> list[psutil.Process]:
        async with serving(commanded(port, SERVER, str(port)), tmp_path) as server:
            assert server.limits.max_model_len > 0
            assert server.process is not None
            root = psutil.Process(server.process.pid)
            members = [root, *root.children(recursive=True)]
            assert len(members) == 2
            server.freeze()
            await _until(lambda: [m.status() for m in members] == [psutil.STATUS_STOPPED] * 2)
            server.thaw()
            await _until(lambda: psutil.STATUS_STOPPED not in [m.status() for m in members])
            server.freeze()  # it must end all the same
            return members

    _, alive = psutil.wait_procs(asyncio.run(main()), timeout=10)
    assert not alive


def test_what_is_at_the_port_already_is_not_measured_in_its_place(tmp_path: Path) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            async with serving(commanded(taken.getsockname()[1], "pass"), tmp_path):
                raise AssertionError("it started")

    with pytest.raises(ConfigError, match="already"):
        asyncio.run(main())


def test_a_command_that_ends_says_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(commanded(_free_port(), "raise SystemExit('no such thing')"), tmp_path):
            raise AssertionError("it started")

    with pytest.raises(WorkerLost, match=r"theirs.*no such thing"):
        asyncio.run(main())


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_system_that_does_not_start_leaves_the_others_to_be_measured(
    tmp_path: Path, fake_grpc: Any, broken_first: bool
) -> None:
    async def main() -> Run:
        async with fake_grpc[1]() as address:
            broken = commanded(_free_port(), "raise SystemExit('no such thing')").model_dump()
            systems = [broken, {"name": "ours", "address": address}]
            scenario = Scenario.model_validate(
                {
                    "systems": systems if broken_first else systems[::-1],
                    "rates": [20],
                    "duration_s": 0.2,
                    "warmup_s": 0,
                    "min_requests": 1,
                }
            )
            return await run_suite(scenario, tmp_path, Silent())

    run = asyncio.run(main())
    failed = {system.name: "no such thing" in system.failed for system in run.systems}
    assert failed == {"theirs": True, "ours": False}
    assert {trial.system for trial in run.trials} == {"ours"}
    page, *_ = write_report(run, tmp_path, png=False)
    assert "no such thing" in page.read_text()


async def _until(holds: Callable[[], bool]) -> None:
    """The kernel tells nobody but the parent when a process has stopped."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  # nothing to wait for
            await asyncio.sleep(0.01)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


EVERY_KV_MOVES = ["coordinator.local_prefill=never", "coordinator.whole_on_prefill=never"]


@pytest.mark.ray
def test_a_real_service_is_started_measured_and_ended(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "tiny")
    scenario = Scenario.model_validate(
        {
            "systems": [{"name": "1P1D", "model": str(tmp_path / "tiny"), "settings": EVERY_KV_MOVES}],
            "classes": [{"input": {"value": 40}, "output": {"value": 4}, "slo": {"e2e_ms": 60000}}],
            "rates": [4],
            "duration_s": 1.5,
            "warmup_s": 0,
            "min_requests": 1,
            "drain_s": 60,
        }
    )
    run = asyncio.run(run_suite(scenario, tmp_path, Silent()))
    (trial,) = run.trials
    assert trial.records
    assert all(record.ok and record.output_tokens == 4 for record in trial.records)
    assert all(record.timings and record.timings.prefill_worker for record in trial.records)
    assert sum(record.timings.bytes_moved for record in trial.records if record.timings) > 0
    assert (tmp_path / "logs" / "1P1D.log").exists()
    assert run.systems[0].units
    model = str(tmp_path / "tiny")
    assert not [p for p in psutil.process_iter(["cmdline"]) if model in (p.info["cmdline"] or [])]
