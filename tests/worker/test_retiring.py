"""A worker that is told to end, or to take no more, by its own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from pdserve.core.messages import Drain, RefusalReason, Role, Undrain
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import SequenceSlice
from tests.support.driver import GREEDY, Driver
from tests.support.token_engine import TokenEngine, reference
from tests.support.workers import DECODE, Pair, config_of, pair_of_workers

PROMPT = [3, 1, 4, 1, 5, 9]


def pair(folder: Path, engines: dict[Role, TokenEngine] | None = None):  # type: ignore[no-untyped-def]
    made = engines or {role: TokenEngine() for role in Role}
    return pair_of_workers(folder, made.__getitem__, config_of())


def test_a_drain_by_its_own_process_is_in_its_heartbeats_and_can_be_taken_back(tmp_path: Path) -> None:
    async def play(workers: Pair) -> None:
        async with Driver(workers.addresses) as driver:
            workers.decode.drain()
            await driver.until(lambda: driver.heartbeats[DECODE][-1].draining)
            assert not driver.heartbeats[DECODE][-1].stopping
            refused = await driver.ask(driver.spec(PROMPT), retry=False)
            assert refused.refused is not None
            assert refused.refused.reason is RefusalReason.DRAINING
            workers.decode.undrain()
            await driver.until(lambda: not driver.heartbeats[DECODE][-1].draining)
            assert await driver.generate(PROMPT) == reference(PROMPT, GREEDY, 8)

    with pair(tmp_path) as workers:
        asyncio.run(play(workers))


def test_a_coordinator_takes_its_drain_back_on_both_workers(tmp_path: Path) -> None:
    async def play(workers: Pair) -> None:
        async with Driver(workers.addresses) as driver:
            for worker in driver.infos:
                driver.send(worker, Drain())
            await driver.until(lambda: all(beats[-1].draining for beats in driver.heartbeats.values()))
            for worker in driver.infos:
                driver.send(worker, Undrain())
            assert await driver.generate(PROMPT) == reference(PROMPT, GREEDY, 8)

    with pair(tmp_path) as workers:
        asyncio.run(play(workers))


def test_a_worker_that_retires_finishes_what_runs_refuses_the_rest_and_ends(tmp_path: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=30)
    engines = {role: TokenEngine() for role in Role}
    reached, may_go_on = threading.Event(), threading.Event()

    def hold(slices: Sequence[SequenceSlice]) -> None:
        if slices[0].start > len(PROMPT) + 5:
            reached.set()
            assert may_go_on.wait(10)

    engines[Role.DECODE].runner.before_step = hold

    async def play(workers: Pair) -> None:
        async with Driver(workers.addresses) as driver:
            running = asyncio.create_task(driver.ask(driver.spec(PROMPT, params)))
            assert await asyncio.to_thread(reached.wait, 10)
            workers.decode.retire(60.0)
            driver.send(DECODE, Undrain())  # a coordinator cannot take it back
            may_go_on.set()
            answer = await running
            assert answer.tokens == reference(PROMPT, params, 30)
            await driver.until(lambda: driver.heartbeats[DECODE][-1].stopping)
            assert driver.heartbeats[DECODE][-1].draining
            await asyncio.to_thread(workers.decode.wait)

    with pair(tmp_path, engines) as workers:
        asyncio.run(play(workers))


def test_a_worker_that_retires_ends_when_its_time_is_up_though_a_request_runs(tmp_path: Path) -> None:
    engines = {role: TokenEngine() for role in Role}
    reached, may_go_on = threading.Event(), threading.Event()

    def hold(slices: Sequence[SequenceSlice]) -> None:
        reached.set()
        assert may_go_on.wait(10)

    engines[Role.DECODE].runner.before_step = hold
    params = SamplingParams(temperature=0.0, max_tokens=10_000, ignore_eos=True)

    async def play(workers: Pair) -> None:
        async with Driver(workers.addresses) as driver:
            running = asyncio.create_task(driver.ask(driver.spec(PROMPT, params)))
            assert await asyncio.to_thread(reached.wait, 10)
            workers.decode.retire(0.0)
            may_go_on.set()
            await asyncio.to_thread(workers.decode.wait)
            assert not running.done()
            running.cancel()

    with pair(tmp_path, engines) as workers:
        asyncio.run(play(workers))


def test_a_retirement_can_be_taken_back_by_its_own_process(tmp_path: Path) -> None:
    async def play(workers: Pair) -> None:
        async with Driver(workers.addresses) as driver:
            workers.prefill.retire(60.0)
            workers.prefill.undrain()
            assert await driver.generate(PROMPT) == reference(PROMPT, GREEDY, 8)
            # Longer than it would have lingered.
            count = len(driver.heartbeats[workers.prefill.info.worker])
            await driver.until(lambda: len(driver.heartbeats[workers.prefill.info.worker]) > count + 4)

    with pair(tmp_path) as workers:
        asyncio.run(play(workers))
