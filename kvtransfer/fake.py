"""A transport that goes wrong on purpose, driven by a seed and by the caller's clock.

Bytes move and notes arrive in `poll(now)`, at times drawn from the seed, so a test or the simulator decides
when anything happens, and the same seed does the same again.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvtransfer.local import LocalBackend, LocalHub, Port
from kvtransfer.protocol import Outcome, Path, PoolRegion, Push, PushEnded, TransferEvent
from pdserve.core.errors import TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong. Probabilities are per push; times in seconds on the clock given to `poll`."""

    seed: int = 0
    delay_s: tuple[float, float] = (0.0, 0.0)
    """A push takes a time from this range. With `reorder` false they land in order all the same."""
    reorder: bool = False
    gigabytes_per_s: float | None = None
    """Adds size / this to each push's time."""
    loss: float = 0.0
    """Never heard of again, neither bytes nor end, until the peer is disconnected."""
    failure: float = 0.0
    """Ends as FAILED, with the first half of its bytes written and no note."""
    fail_every: int = 0
    """So does each push that arrives as the n-th, 2n-th, ... of its sender; 0: none."""
    duplicate: float = 0.0
    """Its note is delivered twice."""
    flip: float = 0.0
    """One byte of it is wrong at the destination."""


@dataclass(frozen=True, slots=True, order=True)
class _Flight:
    due: float
    order: int
    id: int


class FakeBackend(LocalBackend):
    """Shares the hub with `LocalBackend`, and its pools are real: bytes can be compared."""

    PATH: ClassVar[Path] = Path.FAKE

    def __init__(
        self,
        hub: LocalHub,
        worker: WorkerId,
        epoch: int,
        regions: Sequence[PoolRegion],
        fingerprint: Fingerprint,
        faults: Faults,
    ) -> None:
        super().__init__(hub, worker, epoch, regions, fingerprint)
        self._faults = faults
        self._random = random.Random(f"{faults.seed}/{worker}/{epoch}")
        self._fresh: list[Push] = []
        self._schedule: list[_Flight] = []
        self._flying: dict[int, tuple[Push, float]] = {}
        self._last_due = float("-inf")
        self._num_launched = self.num_delivered = self.num_failed = 0

    def max_wait_s(self, now: float) -> float | None:
        if self._fresh:
            return 0.0
        return max(0.0, self._schedule[0].due - now) if self._schedule else None

    def submit(self, push: Push) -> None:
        try:
            self._target(push)
        except TransferError as error:
            self._fail(push, error)
            return
        self._fresh.append(push)

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        known = self._peers.get(peer)
        if known is None or (epoch is not None and known > epoch):
            return
        super().disconnect(peer, epoch)
        gone = [push for push, _ in self._flying.values() if push.peer == peer]
        gone += [push for push in self._fresh if push.peer == peer]
        for push in gone:
            self._forget(push)
            self._events.append(
                PushEnded(id=push.id, outcome=Outcome.FAILED, error=f"{peer} was disconnected")
            )

    def poll(self, now: float) -> list[TransferEvent]:
        for push in self._fresh:
            self._launch(push, now)
        self._fresh.clear()
        while self._schedule and self._schedule[0].due <= now:
            flight = heapq.heappop(self._schedule)
            if flight.id in self._flying:
                self._land(*self._flying[flight.id], flight.due)
        return super().poll(now)

    def close(self) -> None:
        self._flying.clear()
        self._fresh.clear()
        self._schedule.clear()
        super().close()

    def _launch(self, push: Push, now: float) -> None:
        faults = self._faults
        due = now + self._random.uniform(*faults.delay_s)
        if faults.gigabytes_per_s is not None:
            due += self._way(push).size_bytes(push) / (faults.gigabytes_per_s * 1e9)
        if not faults.reorder:
            due = max(due, self._last_due)
        self._last_due = due
        self._flying[push.id] = (push, now)
        if self._random.random() >= faults.loss:
            heapq.heappush(self._schedule, _Flight(due, self._num_launched, push.id))
        self._num_launched += 1

    def _land(self, push: Push, started: float, due: float) -> None:
        self._forget(push)
        try:
            port = self._target(push)
            with port.lock:
                self._deliver(push, port)
        except TransferError as error:
            self._fail(push, error)
            return
        moved = self._way(push).size_bytes(push)
        self._events.append(
            PushEnded(id=push.id, outcome=Outcome.COMPLETED, bytes_moved=moved, seconds=due - started)
        )

    def _deliver(self, push: Push, port: Port) -> None:
        """With the port's lock held. Raises `TransferError`."""
        faults, draw = self._faults, self._random
        failing, flipping = draw.random() < faults.failure, draw.random() < faults.flip
        twice = draw.random() < faults.duplicate
        self.num_delivered += 1
        if faults.fail_every and self.num_delivered % faults.fail_every == 0:
            failing = True
        if failing:
            self.num_failed += 1
            self._copy_half(push, port)
            raise TransferError("failed on purpose, half of its bytes were written")
        self._copy(push, port)
        if flipping:
            self._flip_a_byte(push, port)
        for _ in range(2 if twice else 1):
            self._notify(push, port)

    def _copy_half(self, push: Push, port: Port) -> None:
        if port.closed:
            return
        source, target = self._port.pools[push.group], port.pools[push.group]
        for src, dst, length in self._way(push).spans(push):
            target[dst : dst + length // 2] = source[src : src + length // 2]

    def _flip_a_byte(self, push: Push, port: Port) -> None:
        _, dst, length = self._random.choice(self._way(push).spans(push))
        port.pools[push.group][dst + self._random.randrange(length)] ^= 0xFF

    def _forget(self, push: Push) -> None:
        self._flying.pop(push.id, None)
        self._fresh = [other for other in self._fresh if other.id != push.id]
