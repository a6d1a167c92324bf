"""Workers are added and retired on command, against a host and a team that fail on command; no process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from coordinator.planner.resizing import ChangeState
from pdserve.cluster.placement import WorkerSlot
from pdserve.cluster.scaling import ClusterScaler
from pdserve.core.errors import CheckpointError, ConfigError, WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

MODEL = "llama"


def slot(number: int, role: Role = Role.DECODE) -> WorkerSlot:
    return WorkerSlot(worker=WorkerId(f"{role.value}-{number}"), role=role, index=number)


@dataclass
class FakeCluster:
    """Host and team at once; `log` has everything that was asked of it, in order."""

    log: list[str] = field(default_factory=list)
    slots: tuple[WorkerSlot, ...] = (slot(0),)
    leaving: tuple[WorkerSlot, ...] = ()
    no_room: bool = False
    failures: list[Exception] = field(default_factory=list)
    """Of the next starts."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Drains end once it is set."""

    def add_slot(self, role: Role, model: int) -> WorkerSlot:
        made = slot(len(self.slots), role)
        self.slots += (made,)
        return made

    async def place(self, slot: WorkerSlot, timeout_s: float) -> None:
        self.log.append(f"place {slot.worker} within {timeout_s:g} s")
        if self.no_room:
            raise ConfigError(f"no room for {slot.worker}")

    def retires(self, slot: WorkerSlot) -> None:
        self.log.append(f"{slot.worker} will go")

    def give_back(self, slot: WorkerSlot) -> None:
        self.log.append(f"give back {slot.worker}")

    def devices(self, role: Role, model: int) -> float:
        return 2.0

    async def add(self, slot: WorkerSlot) -> None:
        self.log.append(f"start {slot.worker}")
        if self.failures:
            raise self.failures.pop(0)

    async def retire(self, worker: WorkerId, timeout_s: float | None = None) -> None:
        self.log.append(f"drain {worker}")
        self.draining.set()
        await self.gate.wait()


def drive(cluster: FakeCluster, scenario: Callable[[ClusterScaler], Awaitable[None]]) -> list[str]:
    async def main() -> None:
        scaler = ClusterScaler(cluster, {MODEL: cluster}, place_timeout_s=7)
        try:
            await scenario(scaler)
        finally:
            await scaler.stop()

    asyncio.run(asyncio.wait_for(main(), 10))
    return cluster.log


async def until_ended(scaler: ClusterScaler) -> list[ChangeState]:
    await scaler.idle()
    return [change.state for change in scaler.changes()]


def test_a_worker_is_placed_started_and_done() -> None:
    async def scenario(scaler: ClusterScaler) -> None:
        assert scaler.add(MODEL, Role.DECODE) == "decode-1"
        assert [change.state for change in scaler.changes()] == [ChangeState.PLACING]
        assert await until_ended(scaler) == [ChangeState.DONE]
        assert scaler.num_failed(MODEL) == 0

    assert drive(FakeCluster(), scenario) == ["place decode-1 within 7 s", "start decode-1"]


def test_without_room_it_is_given_up_and_said() -> None:
    async def scenario(scaler: ClusterScaler) -> None:
        scaler.add(MODEL, Role.DECODE)
        assert await until_ended(scaler) == [ChangeState.FAILED]
        assert scaler.changes()[0].text == "no room for decode-1"
        assert scaler.num_failed(MODEL) == 1

    assert drive(FakeCluster(no_room=True), scenario) == ["place decode-1 within 7 s", "give back decode-1"]


def test_a_node_that_dies_during_a_start_is_left_for_another() -> None:
    lost = WorkerLost(WorkerId("decode-1"), "its node died")

    async def scenario(scaler: ClusterScaler) -> None:
        scaler.add(MODEL, Role.DECODE)
        assert await until_ended(scaler) == [ChangeState.DONE]
        assert [change.worker for change in scaler.changes()] == ["decode-2"]

    assert drive(FakeCluster(failures=[lost]), scenario) == [
        "place decode-1 within 7 s",
        "start decode-1",
        "give back decode-1",
        "place decode-2 within 7 s",
        "start decode-2",
    ]


@pytest.mark.parametrize(
    ("failures", "starts"),
    [
        ([WorkerLost(WorkerId("w"), "it fell over")] * 5, 3),
        ([CheckpointError("not a model")], 1),
    ],
)
def test_a_start_that_fails_again_and_again_or_must_fail_is_given_up(
    failures: list[Exception], starts: int
) -> None:
    async def scenario(scaler: ClusterScaler) -> None:
        scaler.add(MODEL, Role.DECODE)
        assert await until_ended(scaler) == [ChangeState.FAILED]

    log = drive(FakeCluster(failures=failures), scenario)
    assert sum(line.startswith("start") for line in log) == starts
    assert sum(line.startswith("give back") for line in log) == starts


def test_a_worker_is_drained_before_its_place_is_given_back() -> None:
    cluster = FakeCluster()

    async def scenario(scaler: ClusterScaler) -> None:
        scaler.retire(MODEL, WorkerId("decode-0"), Role.DECODE)
        await cluster.draining.wait()
        assert [change.state for change in scaler.changes()] == [ChangeState.DRAINING]
        cluster.gate.set()
        assert await until_ended(scaler) == [ChangeState.DONE]

    assert drive(cluster, scenario) == ["decode-0 will go", "drain decode-0", "give back decode-0"]


def test_what_a_killed_launcher_was_retiring_is_retired_by_the_next() -> None:
    cluster = FakeCluster(slots=(slot(0), slot(1)), leaving=(slot(1),))
    cluster.gate.set()

    async def scenario(scaler: ClusterScaler) -> None:
        scaler.go_on()
        assert await until_ended(scaler) == [ChangeState.DONE]

    assert drive(cluster, scenario) == ["decode-1 will go", "drain decode-1", "give back decode-1"]


def test_the_end_of_the_deployment_gives_up_what_is_under_way() -> None:
    cluster = FakeCluster()

    async def scenario(scaler: ClusterScaler) -> None:
        scaler.retire(MODEL, WorkerId("decode-0"), Role.DECODE)
        await cluster.draining.wait()

    assert drive(cluster, scenario)[-1] == "drain decode-0"
