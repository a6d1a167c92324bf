"""The compute loop: drain the inbox, decide, compute, emit. One thread; nobody else touches the scheduler.

    inbox --handle--> actions      events of coordinators and of the transfer service
            sweep --> actions      leases, deadlines, keep-alives, conservation of blocks; every tick
            step  --> actions      one forward pass, if the scheduler has work

It sleeps only in the inbox, until an event or the scheduler's next wake-up; it never polls.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol, assert_never

from pdserve.core.errors import InvariantViolated
from pdserve.core.ids import AttemptId
from pdserve.core.messages import Heartbeat, Message
from pdserve.engine.tiers.store import TierPort
from pdserve.worker.cores import CoreLender
from pdserve.worker.events import (
    Action,
    Actions,
    ConnectTransfer,
    DisconnectTransfer,
    DrainAsked,
    Event,
    FromCoordinator,
    MoveTier,
    OwnerId,
    Send,
    SubmitPush,
    UndrainAsked,
    attempt_of,
)
from pdserve.worker.host import WorkerHost
from pdserve.worker.ports import TransferPort

log = logging.getLogger(__name__)

Perform = Callable[[Iterable[Action]], None]


class Scheduler(Protocol):
    """What both roles' schedulers have in common. Pure: time comes in, actions go out."""

    def handle(self, event: Event, now: float) -> Actions: ...

    def sweep(self, now: float) -> Actions:
        """Time passed: expire, keep alive, and check that every block is accounted for."""
        ...

    def next_wake(self) -> float | None:
        """When `sweep` will have something to do, if nothing happens before."""
        ...

    def fail(self, attempt: AttemptId, owner: OwnerId, error: Exception, now: float) -> Actions:
        """Handling one message about `attempt` went wrong: end it, known or not."""
        ...

    def fail_step(self, error: Exception, now: float) -> Actions:
        """The step that was scheduled last went wrong: end the attempts in it, and no others."""
        ...

    @property
    def idle(self) -> bool:
        """Nothing would be lost if the process ended now."""
        ...

    def audit(self) -> None:
        """Check every block; raises `InvariantViolated`."""
        ...

    def heartbeat(self) -> Heartbeat: ...


class Role(Protocol):
    """A scheduler and how its plans are computed."""

    @property
    def scheduler(self) -> Scheduler: ...

    def step(self, perform: Perform) -> bool:
        """Schedule and compute one step; False when there was nothing to compute."""
        ...


class _Stop:
    """Ends the loop."""


_STOP: Final = _Stop()


class Inbox:
    """Events with the time they happened, from any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._queue: queue.SimpleQueue[tuple[float, Event | _Stop]] = queue.SimpleQueue()
        self._clock = clock

    def put(self, event: Event) -> None:
        self._queue.put((self._clock(), event))

    def stop(self) -> None:
        self._queue.put((self._clock(), _STOP))

    def get(self, timeout_s: float | None) -> tuple[float, Event | _Stop] | None:
        """The next event; None when none came within `timeout_s` (None waits for ever, 0 not at all)."""
        try:
            return self._queue.get(timeout_s is None or timeout_s > 0, timeout_s)
        except queue.Empty:
            return None


class ComputeLoop:
    """Runs a role until it is stopped or breaks. `heartbeat` may be read from any thread."""

    def __init__(
        self,
        *,
        role: Role,
        host: WorkerHost,
        transfer: TransferPort,
        inbox: Inbox,
        lender: CoreLender | None = None,
        tiers: TierPort | None = None,
        linger_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._role, self._host, self._transfer = role, host, transfer
        self._inbox, self._lender, self._clock = inbox, lender, clock
        self._tiers = tiers
        self._outgoing: dict[OwnerId, list[Message]] = {}
        self._published = threading.Condition()
        self._beat = role.scheduler.heartbeat()
        self._stopped = False
        self._linger_s = linger_s
        self._may_end_at: float | None = None
        self._ends_at: float | None = None
        self._tick_began: float | None = None

    def run(self) -> None:
        """Return after `Inbox.stop`, or when what `DrainAsked` set an end to is empty; raise what broke the
        loop."""
        try:
            self._run()
        finally:
            if self._lender is not None:
                self._lender.leave()

    def _run(self) -> None:
        busy = False
        while not self._stopped:
            self._drain(wait=not busy)
            self._tick_began = self._clock()
            self._perform(self._role.scheduler.sweep(self._clock()))
            self._flush()
            busy = not self._stopped and self._step()
            if not busy and self._lender is not None:
                self._lender.leave()
            self._flush()
            self._tick_began = None
            self._publish()
            self._stopped = self._stopped or self._retired()

    def heartbeat(self) -> Heartbeat:
        """The state after the latest tick, and how long the one under way has lasted."""
        began = self._tick_began
        if began is None:
            return self._beat
        return dataclasses.replace(self._beat, step_age_s=self._clock() - began)

    def wait_for(self, condition: Callable[[Heartbeat], bool], timeout_s: float) -> Heartbeat:
        """The first published state that meets `condition`. Raises TimeoutError with the last one."""
        with self._published:
            if not self._published.wait_for(lambda: condition(self._beat), timeout_s):
                raise TimeoutError(f"not within {timeout_s} s; last: {self._beat}")
            return self._beat

    def _drain(self, *, wait: bool) -> None:
        item = self._inbox.get(self._patience() if wait else 0)
        while item is not None:
            at, event = item
            if isinstance(event, _Stop):
                self._stopped = True
                return
            self._perform(self._handle(event, at))
            item = self._inbox.get(0)

    def _patience(self) -> float | None:
        end = self._may_end_at if self._role.scheduler.idle else self._ends_at
        wakes = [at for at in (self._role.scheduler.next_wake(), end) if at is not None]
        return max(0.0, min(wakes) - self._clock()) if wakes else None

    def _retired(self) -> bool:
        """It was told to end, and is empty, or has had its time."""
        if self._ends_at is None or self._may_end_at is None:
            return False
        now = self._clock()
        return now >= self._ends_at or (now >= self._may_end_at and self._role.scheduler.idle)

    def _note_end(self, event: DrainAsked | UndrainAsked, at: float) -> None:
        match event:
            case UndrainAsked():
                self._may_end_at = self._ends_at = None
            case DrainAsked(until=until) if until is not None:
                # Not before coordinators have heard of it: what they send meanwhile is refused, not lost.
                self._may_end_at = min(at + self._linger_s, until)
                self._ends_at = until if self._ends_at is None else min(until, self._ends_at)
            case _:
                pass

    def _handle(self, event: Event, at: float) -> Actions:
        scheduler = self._role.scheduler
        if isinstance(event, (DrainAsked, UndrainAsked)):
            self._note_end(event, at)
        try:
            return scheduler.handle(event, at)
        except InvariantViolated:
            raise
        except Exception as error:  # outermost loop: the attempt it was about fails, the others go on
            attempt = attempt_of(event.message) if isinstance(event, FromCoordinator) else None
            if attempt is None or not isinstance(event, FromCoordinator):
                raise
            log.exception("handling a message about %s failed", attempt)
            actions = scheduler.fail(attempt, event.owner, error, at)
            scheduler.audit()
            return actions

    def _step(self) -> bool:
        if self._lender is not None:
            self._lender.enter()
        try:
            return self._role.step(self._perform)
        except InvariantViolated:
            raise
        except Exception as error:  # outermost loop: the requests of this step fail, the others go on
            log.exception("a step failed")
            self._perform(self._role.scheduler.fail_step(error, self._clock()))
            self._role.scheduler.audit()
            return True

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send(owner, message):
                    self._outgoing.setdefault(owner, []).append(message)
                case SubmitPush(push):
                    self._transfer.submit(push)
                case ConnectTransfer(peer):
                    self._transfer.connect(peer.peer, peer.epoch, peer.fingerprint, peer.metadata)
                case DisconnectTransfer(name, epoch):
                    self._transfer.disconnect(name, epoch)
                case MoveTier(command):
                    if self._tiers is not None:
                        self._tiers.submit(command)
                case _:
                    assert_never(action)

    def _flush(self) -> None:
        if self._outgoing:
            self._host.post(self._outgoing)
            self._outgoing = {}

    def _publish(self) -> None:
        beat = self._role.scheduler.heartbeat()
        with self._published:
            self._beat = beat
            self._published.notify_all()
