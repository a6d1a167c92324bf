"""A prefix goes from the cache of one worker into another's: real workers, real pushes, checked tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from kvtransfer.fake import FakeBackend, Faults
from kvtransfer.local import LocalHub
from kvtransfer.protocol import PoolRegion, TransferBackend
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    KvArrived,
    Message,
    PrefillStarted,
    PushesSettled,
    PushPrefix,
    ReceivePrefix,
    RefusalReason,
    Refused,
    Reserved,
    Role,
    StartDecode,
    Tokens,
    TransferDone,
)
from pdserve.elastic.worker import start_worker
from pdserve.worker.ports import BackendFactory
from pdserve.worker.running import RunningWorker
from tests.support.driver import GREEDY, Driver
from tests.support.token_engine import BLOCK_TOKENS, VOCAB, TokenEngine, reference
from tests.support.workers import DECODE, PREFILL, Pair, config_of, local_backends, pair_of_workers, spec_of

SALT = b""
LENGTH = 8 * BLOCK_TOKENS + 1
SHARED = LENGTH - 1

Scenario = Callable[[Pair, "Mover"], Awaitable[None]]


def prompt_of(seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=LENGTH)


class Mover:
    """What a coordinator does to move one prefix."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._ids = 0

    def begin(
        self, prompt: list[int], source: WorkerId, target: WorkerId, lease_s: float = 20.0
    ) -> AttemptId:
        self._ids += 1
        attempt = AttemptId(RequestId(f"prefix-{self._ids}"), 0)
        self.driver.send(
            target,
            ReceivePrefix(attempt=attempt, tokens=prompt, cache_salt=SALT, writer=source, lease_s=lease_s),
        )
        return attempt

    async def heard(self, attempt: AttemptId, *kinds: type[Message]) -> Message:
        """The first message of these kinds about the attempt."""

        def found() -> list[Message]:
            return [
                m
                for m in self.driver.strays
                if isinstance(m, kinds) and getattr(m, "attempt", None) == attempt
            ]

        await self.driver.until(lambda: bool(found()))
        return found()[0]

    def push(self, reserved: Reserved, prompt: list[int], source: WorkerId, target: WorkerId) -> None:
        self.driver.send(
            source,
            PushPrefix(
                attempt=reserved.attempt,
                tokens=prompt,
                cache_salt=SALT,
                worker=target,
                worker_epoch=self.driver.infos[target].epoch,
                dst_blocks=reserved.blocks,
                dst_cached_tokens=reserved.cached_tokens,
                transfer_deadline_s=5.0,
            ),
        )

    async def move(self, prompt: list[int], source: WorkerId, target: WorkerId) -> tuple[Message, Message]:
        """The last words of both workers."""
        attempt = self.begin(prompt, source, target)
        reserved = await self.heard(attempt, Reserved)
        assert isinstance(reserved, Reserved)
        self.push(reserved, prompt, source, target)
        pushed = await self.heard(attempt, TransferDone, PushesSettled)
        if isinstance(pushed, PushesSettled):
            self.driver.send(target, pushed)
        return pushed, await self.heard(attempt, KvArrived, AttemptFailed)

    async def read(self, prompt: list[int], role: Role) -> int:
        """Ask for an answer, and check it; how many tokens of the prompt were cached at who reads it."""
        answer = await self.driver.ask(self.driver.spec(prompt), colocated=role is Role.DECODE)
        assert answer.failed is None
        assert answer.tokens == reference(prompt, GREEDY, GREEDY.max_tokens)
        (started,) = answer.said(PrefillStarted)
        return started.cached_tokens


def run(
    folder: Path,
    scenario: Scenario,
    backends: BackendFactory | None = None,
    *,
    num_blocks: int = 64,
) -> None:
    """Play a scenario on fresh workers, then find every block back."""

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            await scenario(pair, Mover(driver))

    with pair_of_workers(
        folder, lambda role: TokenEngine(num_blocks=num_blocks), config_of(), backends
    ) as pair:
        asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()


def faulty(faults: Faults) -> BackendFactory:
    hub = LocalHub()

    def make(
        worker: WorkerId, epoch: int, regions: Sequence[PoolRegion], fingerprint: Fingerprint
    ) -> TransferBackend:
        return FakeBackend(hub, worker, epoch, regions, fingerprint, faults)

    return make


WAYS = pytest.mark.parametrize(
    ("source", "target"),
    [((PREFILL, Role.PREFILL), (DECODE, Role.DECODE)), ((DECODE, Role.DECODE), (PREFILL, Role.PREFILL))],
    ids=["prefill to decode", "decode to prefill"],
)


@WAYS
def test_a_prefix_that_a_peer_has_is_not_computed_again(
    tmp_path: Path, source: tuple[WorkerId, Role], target: tuple[WorkerId, Role]
) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        prompt, other = prompt_of(1), [*prompt_of(1)[:SHARED], 5, 6, 7]
        if source[1] is Role.DECODE:
            await mover.read(prompt, Role.DECODE)
        else:  # only the prefill worker keeps it: what the decode worker got is behind another salt
            await fill(mover, prompt)
        done, arrived = await mover.move(prompt, source[0], target[0])
        assert isinstance(done, TransferDone)
        assert done.bytes_moved > 0
        assert isinstance(arrived, KvArrived)
        assert await mover.read(other, target[1]) == SHARED

    run(tmp_path, scenario)


async def fill(mover: Mover, prompt: list[int]) -> None:
    """Into the prefill worker's cache: its decode worker takes it as well, so that is asked for others."""
    await mover.read(prompt, Role.PREFILL)
    for seed in range(40, 60):  # evicts it from the decode worker's pool, and not from the other's
        await mover.read(prompt_of(seed), Role.DECODE)


def test_what_is_cached_already_is_not_sent(tmp_path: Path) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        prompt = prompt_of(1)
        await mover.read(prompt, Role.PREFILL)
        attempt = mover.begin(prompt, PREFILL, DECODE)
        reserved = await mover.heard(attempt, Reserved)
        assert isinstance(reserved, Reserved)
        assert reserved.cached_tokens == SHARED
        pair.decode.wait_for(lambda beat: beat.blocks.held == 0)

    run(tmp_path, scenario)


def test_only_the_missing_end_of_a_prefix_is_sent(tmp_path: Path) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        prompt = prompt_of(1)
        await mover.read(prompt, Role.DECODE)
        await mover.read(prompt[: 3 * BLOCK_TOKENS + 1], Role.PREFILL)
        done, arrived = await mover.move(prompt, DECODE, PREFILL)
        assert isinstance(done, TransferDone)
        assert done.bytes_moved == 5 * TokenEngine().runner.pools[0].layout.block_bytes
        assert isinstance(arrived, KvArrived)
        assert await mover.read(prompt, Role.PREFILL) == SHARED

    run(tmp_path, scenario)


def test_a_prefix_that_nobody_has_fails_both_and_holds_nothing(tmp_path: Path) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        settled, failed = await mover.move(prompt_of(1), DECODE, PREFILL)
        assert isinstance(settled, PushesSettled)
        assert isinstance(failed, AttemptFailed)
        pair.prefill.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0)

    run(tmp_path, scenario)


def test_a_prefix_for_which_there_is_no_room_is_refused(tmp_path: Path) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        attempt = mover.begin(prompt_of(1) * 9, DECODE, PREFILL)
        refused = await mover.heard(attempt, Refused)
        assert isinstance(refused, Refused)
        assert refused.reason is RefusalReason.NO_BLOCKS

    run(tmp_path, scenario)


def test_a_prefix_that_does_not_come_is_in_quarantine_until_its_writer_has_spoken(tmp_path: Path) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        prompt = prompt_of(1)
        await mover.read(prompt, Role.DECODE)
        attempt = mover.begin(prompt, DECODE, PREFILL, lease_s=0.05)
        reserved = await mover.heard(attempt, Reserved)
        assert isinstance(reserved, Reserved)
        failed = await mover.heard(attempt, AttemptFailed)
        assert isinstance(failed, AttemptFailed)
        assert failed.code == "DEADLINE_EXCEEDED"
        pair.prefill.wait_for(lambda beat: beat.blocks.quarantined == 8)
        mover.push(reserved, prompt, DECODE, PREFILL)  # late: it lands in quarantine, and ends it
        await mover.heard(attempt, TransferDone)
        pair.prefill.wait_for(lambda beat: beat.blocks.quarantined == 0)
        assert await mover.read(prompt, Role.PREFILL) == 0

    run(tmp_path, scenario)


def test_a_cancelled_prefix_gives_its_blocks_back(tmp_path: Path) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        attempt = mover.begin(prompt_of(1), DECODE, PREFILL)
        await mover.heard(attempt, Reserved)
        for worker in (PREFILL, DECODE):
            mover.driver.send(worker, Cancel(attempt=attempt, reason="the request is over"))
        settled = await mover.heard(attempt, PushesSettled)  # from the writer, which never heard of it
        mover.driver.send(PREFILL, settled)
        pair.prefill.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0)

    run(tmp_path, scenario)


def test_workers_of_one_role_that_have_just_met_move_a_prefix(tmp_path: Path) -> None:
    """Two decode workers, introduced in the frame before."""
    hub = LocalHub()
    names = WorkerId("decode-0"), WorkerId("decode-1")

    async def answer(mover: Mover, worker: WorkerId, prompt: list[int]) -> int:
        spec = mover.driver.spec(prompt)
        mover.driver.send(worker, StartDecode(spec=spec, prefill_worker=None, lease_s=20.0))
        started = await mover.heard(spec.attempt, PrefillStarted)

        def tokens() -> list[int]:
            said = [m for m in mover.driver.strays if isinstance(m, Tokens) and m.attempt == spec.attempt]
            return [token for message in said for token in message.tokens]

        await mover.driver.until(lambda: len(tokens()) == GREEDY.max_tokens)
        assert tokens() == reference(prompt, GREEDY, GREEDY.max_tokens)
        assert isinstance(started, PrefillStarted)
        return started.cached_tokens

    async def play(workers: list[RunningWorker]) -> None:
        async with Driver([worker.address for worker in workers]) as driver:
            mover, prompt = Mover(driver), prompt_of(1)
            assert await answer(mover, names[0], prompt) == 0
            for one, other in (names, names[::-1]):
                driver.introduce(one, driver.infos[other])
            _, arrived = await mover.move(prompt, *names)
            assert isinstance(arrived, KvArrived)
            assert await answer(mover, names[1], prompt) == SHARED

    workers: list[RunningWorker] = []
    try:
        for name in names:
            spec = spec_of(Role.DECODE, tmp_path, config_of())
            spec = dataclasses.replace(spec, worker=name, listen=f"unix:{tmp_path}/{name}.sock")
            workers.append(start_worker(spec, engine=TokenEngine(), backend_factory=local_backends(hub)))
        asyncio.run(play(workers))
        for worker in workers:
            worker.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0)
    finally:
        for worker in workers:
            worker.stop()


@pytest.mark.parametrize(
    "faults", [Faults(seed=3, failure=0.5), Faults(seed=3, flip=0.5)], ids=["failed", "flipped"]
)
def test_a_push_that_goes_wrong_leaves_no_prefix_and_no_block_behind(tmp_path: Path, faults: Faults) -> None:
    async def scenario(pair: Pair, mover: Mover) -> None:
        outcomes = set()
        for seed in range(8):
            prompt = prompt_of(seed)
            await mover.read(prompt, Role.DECODE)
            _, arrived = await mover.move(prompt, DECODE, PREFILL)
            came = isinstance(arrived, KvArrived)
            outcomes.add(came)
            attempt = mover.begin(prompt, DECODE, PREFILL)
            reserved = await mover.heard(attempt, Reserved)
            assert isinstance(reserved, Reserved)
            assert reserved.cached_tokens == (SHARED if came else 0)
            if not came:
                mover.driver.send(PREFILL, PushesSettled(attempt=attempt))
                await mover.heard(attempt, AttemptFailed)
        assert outcomes == {True, False}
        pair.prefill.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0)

    run(tmp_path, scenario, faulty(faults))
