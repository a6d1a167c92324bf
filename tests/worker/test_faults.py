"""What goes wrong between two workers, and what must stay right: tokens, blocks, and everybody else."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from kvtransfer.fake import FakeBackend, Faults
from kvtransfer.local import LocalHub
from kvtransfer.protocol import PoolRegion, TransferBackend
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.messages import (
    Cancel,
    Drain,
    DropPeer,
    Heartbeat,
    PushesSettled,
    RefusalReason,
    Refused,
    RenewLease,
    Role,
    StartDecode,
)
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import SequenceSlice
from pdserve.worker.ports import BackendFactory
from pdserve.worker.running import RunningWorker
from tests.support.driver import GREEDY, Driver
from tests.support.token_engine import VOCAB, TokenEngine, reference
from tests.support.workers import DECODE, PREFILL, Pair, config_of, pair_of_workers

SAMPLED = SamplingParams(temperature=1.0, seed=99, max_tokens=10)
POISON = VOCAB - 1

Scenario = Callable[[Pair, Driver], Awaitable[None]]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length}/{seed}").choices(range(VOCAB - 1), k=length)


def faulty(faults: Faults, made: list[FakeBackend] | None = None) -> BackendFactory:
    """made: gets every backend, which count what they did wrong."""
    hub = LocalHub()

    def make(
        worker: WorkerId, epoch: int, regions: Sequence[PoolRegion], fingerprint: Fingerprint
    ) -> TransferBackend:
        backend = FakeBackend(hub, worker, epoch, regions, fingerprint, faults)
        if made is not None:
            made.append(backend)
        return backend

    return make


async def until(worker: RunningWorker, condition: Callable[[Heartbeat], bool]) -> Heartbeat:
    return await asyncio.to_thread(worker.wait_for, condition, 5.0)


def run(
    folder: Path,
    scenario: Scenario,
    *,
    faults: Faults | None = None,
    engines: dict[Role, TokenEngine] | None = None,
    expect_all_blocks: bool = True,
) -> None:
    engines = engines or {role: TokenEngine() for role in Role}

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            await scenario(pair, driver)
        if expect_all_blocks:
            pair.wait_until_every_block_is_back()

    backends = faulty(faults or Faults())
    with pair_of_workers(folder, lambda role: engines[role], config_of(), backends) as pair:
        asyncio.run(play(pair))


# --- transfers --------------------------------------------------------------------------------------


def test_pushes_that_are_slow_out_of_order_and_said_twice_change_no_token(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompts = [prompt_of(5 + 9 * i, i) for i in range(8)]
        answers = await asyncio.gather(*[driver.generate(prompt, SAMPLED) for prompt in prompts])
        assert answers == [reference(prompt, SAMPLED, 10) for prompt in prompts]

    run(tmp_path, scenario, faults=Faults(delay_s=(0.0, 0.03), reorder=True, duplicate=0.5))


def test_a_failed_push_fails_its_attempt_as_retryable_and_a_retry_gets_the_tokens(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        failures = 0
        for index in range(12):
            spec = driver.spec(prompt_of(40, index), SAMPLED)
            for epoch in range(30):
                answer = await driver.ask(
                    dataclasses.replace(spec, attempt=AttemptId(spec.attempt.request, epoch))
                )
                if answer.failed is None:
                    break
                failures += 1
                assert answer.failed.retryable
                assert answer.failed.code == "UNAVAILABLE"
            assert answer.tokens == reference(spec.tokens, SAMPLED, 10)
        assert failures > 0

    run(tmp_path, scenario, faults=Faults(seed=3, failure=0.1, delay_s=(0.0, 0.002)))


def test_a_flipped_byte_fails_its_attempt_and_never_becomes_text(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        failures = 0
        for index in range(12):
            spec = driver.spec(prompt_of(40, index), SAMPLED)
            for epoch in range(100):
                answer = await driver.ask(
                    dataclasses.replace(spec, attempt=AttemptId(spec.attempt.request, epoch))
                )
                if answer.failed is None:
                    break
                failures += 1
                assert answer.failed.retryable
                assert answer.failed.code == "DATA_LOSS"
                assert answer.tokens in ([], reference(spec.tokens, SAMPLED, 10)[:1])
            assert answer.tokens == reference(spec.tokens, SAMPLED, 10)
        # Which are flipped depends on their order, and that on the machine: more than half of all attempts.
        assert failures > 0

    run(tmp_path, scenario, faults=Faults(seed=3, flip=0.15, delay_s=(0.0, 0.002), reorder=True))


def test_a_lost_push_keeps_both_sides_blocks_in_quarantine_until_the_peer_is_gone(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        spec = driver.spec(prompt_of(10))
        task = asyncio.create_task(driver.ask(spec, lease_s=0.3))
        # The decode worker's lease ends; the coordinator cancels; the lost push stays under way.
        await until(pair.decode, lambda beat: beat.blocks.quarantined == 3)
        assert not task.done()
        prefill = await until(pair.prefill, lambda beat: beat.running == 0)
        assert prefill.blocks.held == 3
        driver.send(PREFILL, DropPeer(peer=DECODE, epoch=1))
        answer = await task
        assert answer.failed is not None
        assert answer.failed.retryable
        assert "lease" in answer.failed.message
        assert len(answer.said(PushesSettled)) == 1

    run(tmp_path, scenario, faults=Faults(loss=1.0))


def test_a_push_past_its_deadline_fails_the_attempt_and_quarantines_what_it_reads(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        task = asyncio.create_task(driver.ask(driver.spec(prompt_of(10)), transfer_deadline_s=0.2))
        await until(pair.prefill, lambda beat: beat.blocks.quarantined == 3)
        driver.send(PREFILL, DropPeer(peer=DECODE, epoch=1))
        answer = await task
        assert answer.failed is not None
        assert answer.failed.retryable
        assert "push" in answer.failed.message

    run(tmp_path, scenario, faults=Faults(loss=1.0))


def test_kv_that_arrives_after_the_lease_is_ignored_and_its_blocks_come_back(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        answer = await driver.ask(driver.spec(prompt_of(10)), lease_s=0.05)
        assert answer.failed is not None
        assert answer.failed.code == "DEADLINE_EXCEEDED"
        await asyncio.to_thread(pair.wait_until_every_block_is_back)
        assert await driver.generate(prompt_of(7), colocated=True) == reference(prompt_of(7), GREEDY, 8)

    run(tmp_path, scenario, faults=Faults(delay_s=(2.0, 2.0)))


def test_a_renewed_lease_outlasts_a_slow_transfer(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        spec = driver.spec(prompt_of(10))
        task = asyncio.create_task(driver.ask(spec, lease_s=0.3))
        await until(pair.decode, lambda beat: beat.waiting == 1)
        driver.send(DECODE, RenewLease(attempt=spec.attempt, lease_s=20.0))
        answer = await task
        assert answer.tokens == reference(spec.tokens, GREEDY, 8)

    run(tmp_path, scenario, faults=Faults(delay_s=(0.6, 0.6)))


def test_a_decode_worker_releases_what_a_dead_prefill_worker_could_have_written(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        spec = driver.spec(prompt_of(10))
        task = asyncio.create_task(driver.ask(spec))
        await until(pair.decode, lambda beat: beat.waiting == 1)
        driver.send(DECODE, DropPeer(peer=PREFILL, epoch=1))
        driver.send(PREFILL, DropPeer(peer=DECODE, epoch=1))
        answer = await task
        assert answer.failed is not None
        assert answer.failed.code == "UNAVAILABLE"

    run(tmp_path, scenario, faults=Faults(loss=1.0))


# --- steps ------------------------------------------------------------------------------------------


def poisoned(role: Role) -> dict[Role, TokenEngine]:
    """Workers whose steps break, on one of them, when a certain token is in it."""
    engines = {each: TokenEngine() for each in Role}

    def explode(slices: Sequence[SequenceSlice]) -> None:
        if any(POISON in s.tokens for s in slices):
            raise RuntimeError("the kernel exploded")

    engines[role].runner.before_step = explode
    return engines


@pytest.mark.parametrize("role", list(Role))
def test_a_step_that_breaks_fails_its_requests_and_the_worker_goes_on(tmp_path: Path, role: Role) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        colocated = role is Role.DECODE
        answer = await driver.ask(driver.spec([*prompt_of(9), POISON]), colocated=colocated)
        assert answer.failed is not None
        assert answer.failed.code == "INTERNAL"
        assert answer.failed.retryable
        assert "the kernel exploded" in answer.failed.message
        assert await driver.generate(prompt_of(9), colocated=colocated) == reference(prompt_of(9), GREEDY, 8)

    run(tmp_path, scenario, engines=poisoned(role))


def test_a_worker_whose_books_are_wrong_dies_loudly(tmp_path: Path) -> None:
    engines = {each: TokenEngine() for each in Role}

    async def scenario(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            pool = pair.decode._loop._role.scheduler._shared.pool  # type: ignore[attr-defined]
            pool._counts[0] -= 1
            driver.send(DECODE, Drain())
            await asyncio.to_thread(pair.decode._thread.join, 5.0)

    with (
        pytest.raises(Exception, match="not conserved"),
        pair_of_workers(tmp_path, lambda role: engines[role]) as pair,
    ):
        asyncio.run(scenario(pair))


def test_a_long_step_neither_stops_heartbeats_nor_looks_dead(tmp_path: Path) -> None:
    engines = {each: TokenEngine() for each in Role}
    go_on = threading.Event()
    engines[Role.DECODE].runner.before_step = lambda slices: go_on.wait(10.0)  # type: ignore[assignment,return-value]

    async def scenario(pair: Pair, driver: Driver) -> None:
        task = asyncio.create_task(driver.generate(prompt_of(5), colocated=True))
        seen = len(driver.heartbeats[DECODE])
        await driver.until(lambda: len(driver.heartbeats[DECODE]) >= seen + 4)
        assert not task.done()
        go_on.set()
        assert await task == reference(prompt_of(5), GREEDY, 8)

    run(tmp_path, scenario, engines=engines)


# --- coordinators and peers -------------------------------------------------------------------------


def test_a_coordinator_that_goes_away_takes_its_requests_with_it(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        endless = dataclasses.replace(GREEDY, max_tokens=140, ignore_eos=True)
        async with Driver(pair.addresses) as other:
            tasks = [
                asyncio.create_task(other.ask(other.spec(prompt_of(9, i), endless), colocated=i % 2 == 0))
                for i in range(4)
            ]
            # Two decode already, two have their pushes under way.
            await until(pair.decode, lambda beat: beat.running == 2)
            await until(pair.prefill, lambda beat: beat.prefix_query_tokens == 18)
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await driver.generate(prompt_of(9)) == reference(prompt_of(9), GREEDY, 8)

    run(tmp_path, scenario, faults=Faults(delay_s=(0.2, 0.3)))


def test_two_coordinators_are_served_side_by_side(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        async with Driver(pair.addresses) as other:
            prompts = [prompt_of(6 + i, i) for i in range(10)]
            asked = [d.generate(p, SAMPLED) for p in prompts for d in (driver, other)]
            answers = await asyncio.gather(*asked)
            assert answers == [reference(p, SAMPLED, 10) for p in prompts for _ in range(2)]
        assert driver.strays == other.strays == []

    run(tmp_path, scenario)


def test_a_peer_of_another_epoch_or_never_met_is_refused(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        wrong = driver.spec(prompt_of(6))
        driver.infos[DECODE] = dataclasses.replace(driver.infos[DECODE], epoch=7)
        answer = await driver.ask(wrong)
        assert answer.failed is not None
        assert answer.failed.retryable
        assert "epoch" in answer.failed.message
        unknown = driver.spec(prompt_of(6))
        driver.infos[PREFILL] = dataclasses.replace(driver.infos[PREFILL], worker=WorkerId("prefill-9"))
        refused = await driver.ask(unknown, retry=False)
        assert refused.refused is not None
        assert refused.refused.reason is RefusalReason.UNKNOWN_PEER

    run(tmp_path, scenario)


def test_peers_with_different_models_never_exchange_a_byte(tmp_path: Path) -> None:
    engines = {Role.PREFILL: TokenEngine(), Role.DECODE: TokenEngine(model="another")}

    async def scenario(pair: Pair, driver: Driver) -> None:
        answer = await driver.ask(driver.spec(prompt_of(6)), retry=False)
        assert answer.failed is not None or answer.refused is not None
        assert answer.tokens == []

    run(tmp_path, scenario, engines=engines)


def test_a_cancel_of_an_unknown_attempt_is_answered_by_either_worker(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        attempt = AttemptId(RequestId("never seen"), 3)
        driver.send(PREFILL, Cancel(attempt=attempt, reason="test"))
        driver.send(DECODE, Cancel(attempt=attempt, reason="test"))
        await driver.until(lambda: len(driver.strays) == 2)
        assert driver.strays == [PushesSettled(attempt=attempt)] * 2

    run(tmp_path, scenario)


def test_an_attempt_that_another_coordinator_runs_is_refused_and_left_alone(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        spec = driver.spec(prompt_of(9), dataclasses.replace(SAMPLED, max_tokens=60))
        first = asyncio.create_task(driver.ask(spec))
        await until(pair.decode, lambda beat: beat.waiting + beat.running == 1)
        async with Driver(pair.addresses) as other:
            answer = await other.ask(spec)
            assert answer.failed is not None
            assert not answer.failed.retryable
        assert (await first).tokens == reference(spec.tokens, SAMPLED, 60)

    run(tmp_path, scenario)


def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        running = asyncio.create_task(driver.generate(prompt_of(20), SAMPLED))
        await until(pair.prefill, lambda beat: beat.steps > 0)
        driver.send(DECODE, Drain())
        await until(pair.decode, lambda beat: beat.draining)
        late = await driver.ask(driver.spec(prompt_of(4)), retry=False)
        assert late.refused is not None
        assert late.refused.reason is RefusalReason.DRAINING
        assert await running == reference(prompt_of(20), SAMPLED, 10)

    run(tmp_path, scenario)


def test_a_prompt_that_can_never_fit_is_refused_with_its_limit(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        answer = await driver.ask(driver.spec(prompt_of(160)), retry=False)
        assert answer.refused is not None
        assert answer.refused.reason is RefusalReason.TOO_LONG
        assert "160 tokens" in answer.refused.detail

    run(tmp_path, scenario)


def test_a_request_for_the_other_role_is_refused(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        spec = driver.spec(prompt_of(4))
        driver.send(PREFILL, StartDecode(spec=spec, prefill_worker=DECODE, lease_s=1.0))
        await driver.until(lambda: bool(driver.strays))
        (refused,) = driver.strays
        assert isinstance(refused, Refused)
        assert refused.reason is RefusalReason.WRONG_ROLE

    run(tmp_path, scenario)
