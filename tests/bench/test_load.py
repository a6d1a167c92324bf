"""Sending on time over real gRPC and real HTTP: nothing that was due is left out of the figures."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pdserve.bench.drivers import Driver, GrpcDriver, make_driver
from pdserve.bench.load import run_trial
from pdserve.bench.records import Trial, summarise
from pdserve.bench.scenario import Protocol, Scenario, SystemSpec
from pdserve.bench.workload import ServerLimits, Workload, build_workload
from pdserve.core.errors import PdServeError, WorkerLost

LIMITS = ServerLimits(vocab_size=512, max_model_len=256)
RATE = 50.0


def steady(**changes: Any) -> Workload:
    """One request every 20 ms for a second, two tokens each."""
    base: dict[str, Any] = {
        "arrivals": {"kind": "uniform"},
        "warmup_s": 0,
        "duration_s": 1.0,
        "classes": [{"input": {"value": 8}, "output": {"value": 2}, "slo": {"ttft_ms": 100}}],
    }
    return build_workload(Scenario.model_validate(base | changes), RATE, 0, LIMITS)


async def measured(driver: Driver, workload: Workload, *, drain_s: float = 5.0) -> Trial:
    try:
        return await run_trial(driver, workload, system="fake", rate=RATE, round=0, drain_s=drain_s)
    finally:
        await driver.close()


def of(address: str) -> SystemSpec:
    spoken = Protocol.OPENAI if address.startswith("http") else Protocol.GRPC
    return SystemSpec(name="fake", address=address, protocol=spoken)


@pytest.mark.parametrize("kind", ["fake_grpc", "fake_openai"])
def test_a_stalled_server_is_slow_for_every_request_that_was_due_meanwhile(
    kind: str, request: pytest.FixtureRequest, make_stall: Callable[..., Any]
) -> None:
    fake, serve = request.getfixturevalue(kind)
    fake.gate = make_stall(0.2, 0.7)

    async def main() -> Trial:
        async with serve() as address:
            driver = make_driver(of(address), address)
            await driver.limits()
            return await measured(driver, steady())

    trial = asyncio.run(main())
    assert len(trial.records) == 50
    assert all(record.ok for record in trial.records)
    # These were due in the stall; a client that waits for answers would have seen one slow one.
    due = [record for record in trial.counted if 0.4 <= record.intended_s < 0.6]
    assert len(due) == 10
    assert all((record.ttft_s or 0) > 0.69 - record.intended_s for record in due)
    assert not any(record.met for record in due if record.intended_s < 0.59)


def test_a_stalled_client_is_not_hidden_either(fake_grpc: Any) -> None:
    fake, serve = fake_grpc
    stalled = False

    async def stall_the_loop() -> None:
        nonlocal stalled
        if len(fake.prompts) == 10 and not stalled:
            stalled = True
            time.sleep(0.3)  # noqa: ASYNC251  # the point: nothing is sent meanwhile

    fake.gate = stall_the_loop

    async def main() -> Trial:
        async with serve() as address:
            return await measured(GrpcDriver(address, None), steady())

    trial = asyncio.run(main())
    summary = summarise(trial.counted, trial.wall_s)
    assert stalled
    assert summary.send_lag_s["max"] > 0.2
    assert sum((record.ttft_s or 0) > 0.1 for record in trial.records) >= 8


def test_what_is_not_answered_in_time_is_cut_and_misses(fake_grpc: Any) -> None:
    fake, serve = fake_grpc

    async def never() -> None:
        await asyncio.Event().wait()

    fake.gate = never

    async def main() -> Trial:
        async with serve() as address:
            return await measured(GrpcDriver(address, None), steady(duration_s=0.2), drain_s=0.2)

    trial = asyncio.run(main())
    assert {record.error for record in trial.records} == {"cut"}
    assert trial.attainment == 0.0


def test_refusals_are_counted_by_kind(fake_grpc: Any) -> None:
    fake, serve = fake_grpc
    fake.refuse = grpc.StatusCode.RESOURCE_EXHAUSTED

    async def main() -> Trial:
        async with serve() as address:
            return await measured(GrpcDriver(address, None), steady(duration_s=0.2))

    summary = summarise(asyncio.run(main()).counted, 1.0)
    assert summary.errors == {"Overloaded": 10}
    assert summary.misses == {"error": 10}
    assert summary.attainment == 0.0


def test_http_errors_are_counted(fake_openai: Any) -> None:
    fake, serve = fake_openai
    fake.status = 503

    async def main() -> Trial:
        async with serve() as address:
            driver = make_driver(of(address), address)
            await driver.limits()
            return await measured(driver, steady(duration_s=0.2))

    assert summarise(asyncio.run(main()).counted, 1.0).errors == {"HttpRefusal": 10}


def test_a_turn_holds_everything_said_before_it(fake_grpc: Any) -> None:
    fake, serve = fake_grpc
    turns = {"input": {"value": 8}, "output": {"value": 2}, "slo": {"ttft_ms": 1000}}
    turns["sessions"] = {"turns": {"value": 3}, "think_s": 0.01}

    async def main() -> Trial:
        async with serve() as address:
            return await measured(GrpcDriver(address, None), steady(classes=[turns], duration_s=0.02))

    trial = asyncio.run(main())
    first, second, third = sorted(fake.prompts, key=len)
    assert [len(first), len(second), len(third)] == [8, 8 + 2 + 8, 8 + 2 + 8 + 2 + 8]
    assert second[:10] == [*first, 1, 2]
    assert third[:18] == second
    records = sorted(trial.records, key=lambda record: record.turn)
    assert all(b.intended_s > (a.done_s or 0) for a, b in itertools.pairwise(records))


def test_both_protocols_count_the_same_tokens(fake_grpc: Any, fake_openai: Any) -> None:
    async def main() -> list[Trial]:
        trials = []
        for _, serve in (fake_grpc, fake_openai):
            async with serve() as address:
                driver = make_driver(of(address), address)
                await driver.limits()
                trials.append(await measured(driver, steady(duration_s=0.2)))
        return trials

    over_grpc, over_http = asyncio.run(main())
    assert [r.output_tokens for r in over_grpc.records] == [r.output_tokens for r in over_http.records]
    assert all(record.timings is not None for record in over_grpc.records)
    assert fake_openai[0].bodies[0]["ignore_eos"] is True


def test_a_server_that_is_not_there_is_a_typed_error() -> None:
    async def main(address: str) -> None:
        driver = make_driver(of(address), address)
        try:
            await driver.limits()
        finally:
            await driver.close()

    with pytest.raises(WorkerLost, match=r"127\.0\.0\.1:1"):
        asyncio.run(main("http://127.0.0.1:1"))
    with pytest.raises(PdServeError):
        asyncio.run(main("127.0.0.1:1"))
