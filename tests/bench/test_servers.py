"""pdserve services that a run starts: asked, measured, and ended."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from pdserve.bench.scenario import Scenario, SystemSpec
from pdserve.bench.servers import serve_command, serving
from pdserve.bench.suite import run_suite
from pdserve.core.errors import WorkerLost
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


@pytest.mark.ray
def test_a_real_service_is_started_measured_and_ended(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "tiny")
    scenario = Scenario.model_validate(
        {
            "systems": [{"name": "1P1D", "model": str(tmp_path / "tiny")}],
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
