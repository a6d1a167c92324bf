"""The supervisor against workers that die on command; no process, no Ray, no waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from pdserve.cluster.placement import WorkerSlot
from pdserve.cluster.supervisor import Backoff, Supervisor
from pdserve.core.errors import ConfigError, WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

P0 = WorkerSlot(worker=WorkerId("prefill-0"), role=Role.PREFILL, index=0)
D0 = WorkerSlot(worker=WorkerId("decode-0"), role=Role.DECODE, index=0)


@dataclass
class FakeWorker:
    address: str
    log: list[str]
    death: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    answers: bool = True
    pid: int = 1
    epoch: int = 1

    async def died(self) -> str:
        return await asyncio.shield(self.death)

    async def ping(self) -> None:
        if not self.answers:
            await asyncio.Event().wait()

    async def retire(self, timeout_s: float | None) -> None:
        self.log.append(f"retire {self.address}")
        self.death.set_result("it was told to end, and has")

    async def stop(self, grace_s: float) -> None:
        self.log.append(f"stop {self.address}")

    async def kill(self) -> None:
        self.log.append(f"kill {self.address}")


@dataclass
class FakeCluster:
    """Host and registry at once; `log` has everything the supervisor did, in order."""

    log: list[str] = field(default_factory=list)
    workers: dict[str, FakeWorker] = field(default_factory=dict)
    fail: dict[str, Exception] = field(default_factory=dict)
    added: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    given_up: set[WorkerId] = field(default_factory=set)

    async def launch(self, slot: WorkerSlot, epoch: int) -> FakeWorker:
        name = f"{slot.worker}.{epoch}"
        self.log.append(f"launch {name}")
        if name in self.fail:
            raise self.fail[name]
        self.workers[name] = FakeWorker(name, self.log, epoch=epoch)
        return self.workers[name]

    async def add(self, address: str) -> None:
        self.log.append(f"add {address}")
        self.added.put_nowait(address)

    async def remove(self, worker: WorkerId, why: str) -> None:
        self.log.append(f"remove {worker}: {why}")

    def is_up(self, worker: WorkerId) -> bool:
        return worker not in self.given_up


def drive(
    scenario: Callable[[FakeCluster, Supervisor], Awaitable[None]],
    *slots: WorkerSlot,
    ping_timeout_s: float = 60,
) -> tuple[list[str], list[float]]:
    """Run a scenario; returns what happened and the waits between restarts."""
    cluster, waits = FakeCluster(), list[float]()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    async def main() -> None:
        supervisor = Supervisor(cluster, cluster, slots, ping_timeout_s=ping_timeout_s, sleep=sleep)
        try:
            await scenario(cluster, supervisor)
        finally:
            await supervisor.stop(1.0)

    asyncio.run(asyncio.wait_for(main(), 10))
    return cluster.log, waits


async def until_added(cluster: FakeCluster, address: str) -> None:
    while await cluster.added.get() != address:
        pass


def test_every_worker_is_started_registered_and_stopped() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        assert supervisor.epochs() == {"prefill-0": 1, "decode-0": 1}

    log, _ = drive(scenario, P0, D0)
    assert sorted(log) == sorted(
        f"{verb} {name}.1" for verb in ("launch", "add", "stop") for name in ("prefill-0", "decode-0")
    )


def test_a_dead_worker_is_killed_removed_and_replaced_with_the_next_epoch() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        cluster.workers["prefill-0.1"].death.set_result("signal 9")
        await until_added(cluster, "prefill-0.2")
        assert supervisor.epochs() == {"prefill-0": 2}

    log, waits = drive(scenario, P0)
    assert log == [
        "launch prefill-0.1",
        "add prefill-0.1",
        "kill prefill-0.1",
        "remove prefill-0: signal 9",
        "launch prefill-0.2",
        "add prefill-0.2",
        "stop prefill-0.2",
    ]
    assert waits == []


def test_a_worker_that_lives_but_answers_nothing_is_replaced() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        cluster.workers["decode-0.1"].answers = False
        await until_added(cluster, "decode-0.2")

    log, _ = drive(scenario, D0, ping_timeout_s=0.02)
    assert "remove decode-0: no answer for 0.02 s" in log


def test_a_worker_that_the_coordinator_gave_up_is_replaced_though_it_answers() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        cluster.given_up.add(P0.worker)
        await until_added(cluster, "prefill-0.2")

    log, _ = drive(scenario, P0, ping_timeout_s=0.02)
    assert "remove prefill-0: the coordinator gave it up" in log


def test_the_death_of_one_worker_leaves_the_other_alone() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        cluster.workers["decode-0.1"].death.set_result("gone")
        await until_added(cluster, "decode-0.2")
        assert supervisor.epochs() == {"prefill-0": 1, "decode-0": 2}

    log, _ = drive(scenario, P0, D0)
    assert "kill prefill-0.1" not in log


def test_a_crash_loop_backs_off() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        for epoch in (2, 3, 4):
            cluster.fail[f"decode-0.{epoch}"] = WorkerLost("decode-0", "crashed while loading")
        await supervisor.start()
        cluster.workers["decode-0.1"].death.set_result("gone")
        await until_added(cluster, "decode-0.5")

    _, waits = drive(scenario, D0)
    assert waits == [0.5, 1.0, 2.0]


def test_a_deployment_whose_first_start_fails_fails_with_that_error_and_stops_the_rest() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        cluster.fail["decode-0.1"] = ConfigError("no such device")
        with pytest.raises(ConfigError, match="no such device"):
            await supervisor.start()

    log, _ = drive(scenario, P0, D0)
    assert not any(line.startswith("launch prefill-0.2") for line in log)


def test_backoff_forgets_failures_after_a_healthy_life() -> None:
    backoff = Backoff(first_s=1.0, limit_s=5.0, healthy_s=60.0)
    assert [backoff.after(0.0) for _ in range(6)] == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.after(61.0) == 0.0
    assert backoff.after(0.0) == 1.0


def test_a_worker_that_is_retired_hands_over_and_gets_no_successor() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        await supervisor.retire(D0.worker)
        assert supervisor.epochs().keys() == {"prefill-0"}
        await supervisor.retire(D0.worker)  # it is no more: nothing happens

    log, _ = drive(scenario, P0, D0)
    assert [line for line in log if "decode-0" in line] == [
        "launch decode-0.1",
        "add decode-0.1",
        "retire decode-0.1",
        "kill decode-0.1",
        "remove decode-0: it was told to end, and has",
    ]


def test_a_worker_that_is_dead_when_it_is_retired_is_not_started_again() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        cluster.fail["decode-0.2"] = WorkerLost(D0.worker, "no")
        never = asyncio.Event()

        async def wait(seconds: float) -> None:
            waiting.set()
            await never.wait()

        waiting = asyncio.Event()
        supervisor._sleep = wait
        cluster.workers["decode-0.1"].death.set_result("signal 9")
        await waiting.wait()
        await supervisor.retire(D0.worker)
        assert supervisor.epochs() == {}

    log, _ = drive(scenario, D0)
    assert not [line for line in log if line.startswith("retire")]


def test_a_worker_that_is_added_is_supervised_and_one_that_does_not_start_leaves_nothing() -> None:
    async def scenario(cluster: FakeCluster, supervisor: Supervisor) -> None:
        await supervisor.start()
        await supervisor.add(D0)
        cluster.workers["decode-0.1"].death.set_result("signal 9")
        await until_added(cluster, "decode-0.2")
        cluster.fail["decode-1.1"] = WorkerLost(WorkerId("decode-1"), "no")
        with pytest.raises(WorkerLost):
            await supervisor.add(WorkerSlot(worker=WorkerId("decode-1"), role=Role.DECODE, index=1))
        assert supervisor.epochs() == {"prefill-0": 1, "decode-0": 2}

    drive(scenario, P0)
