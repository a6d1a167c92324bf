"""The transfer thread of a worker: commands in from any thread, events out to one callback.

Waking. The thread sleeps in one `epoll` on its own eventfd (written by `submit` and friends) and on the
backend's `wake_fds`; nothing is polled on a timer unless the backend asks for it. While a push is under way
the thread first spins (`SPIN_POLLS` polls with the GIL yielded between them), then sleeps in steps of 1 ms,
because transports without a descriptor complete silently. Measured in one run on a loaded two-core machine,
share of a core while idle: this 0.3% (0.03% were it not for the 50 ms that the NIXL backend asks for, in case
a descriptor fails to tell), a timer of 1 ms 4.7%, NIXL's progress thread 39% as shipped and 2.4% with a delay
of 1 ms. A note is an event 0.4 ms (best), 0.7 ms (median) after an idle sender's `submit`: docs/transfer.md.

Order. The pushes of a flow to one peer start in the order of `submit`; flows take turns by bytes (`queues`),
and at most `max_inflight_bytes` are under way to one peer. Peers take turns too, a fragment of a push each,
with a `poll` between, so notes are seen while a long backlog is sent.

Notes travel in an envelope with the digest of their push, where it has one (`integrity`).
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from kvtransfer.integrity import Verifier, seal
from kvtransfer.protocol import (
    DEFAULT_INFLIGHT_BYTES,
    NoteArrived,
    Outcome,
    PeerConnected,
    PeerFailed,
    Push,
    PushEnded,
    TransferBackend,
    TransferEvent,
    TransferStopped,
)
from kvtransfer.queues import FRAGMENT_BYTES, Fragment, PeerQueue, Sending, fragments
from kvtransfer.spans import require_push
from kvtransfer.waiting import Waiter, patience
from pdserve.core.errors import InvariantViolated, TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.transfer_settings import Verify

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Submit:
    push: Push


@dataclass(frozen=True, slots=True)
class _Connect:
    peer: WorkerId
    epoch: int
    fingerprint: Fingerprint
    metadata: bytes


@dataclass(frozen=True, slots=True)
class _Disconnect:
    peer: WorkerId
    epoch: int | None


_Command = _Submit | _Connect | _Disconnect


class TransferService:
    """Owns the thread that drives one backend. Every method returns at once; outcomes are events.

    `on_event` is called on the transfer thread and must not block. The last event is `TransferStopped`.
    """

    def __init__(
        self,
        backend: TransferBackend,
        on_event: Callable[[TransferEvent], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        max_inflight_bytes: int = DEFAULT_INFLIGHT_BYTES,
        verify: Verify = Verify.AUTO,
        fragment_bytes: int = FRAGMENT_BYTES,
    ) -> None:
        self._backend, self._on_event, self._clock = backend, on_event, clock
        self._max_inflight_bytes, self._fragment_bytes = max_inflight_bytes, fragment_bytes
        self._lock = threading.Lock()
        self._commands: deque[_Command] = deque()
        self._ids: set[int] = set()
        self._stopping = False
        self._ended = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._live: dict[int, Sending] = {}
        self._queues: dict[WorkerId, PeerQueue] = {}
        self._whose: dict[int, Sending] = {}
        self._fragment_ids = itertools.count(-1, -1)
        self._verifier = Verifier(backend.regions, verify)
        self._next_deadline = float("inf")
        self._thread = threading.Thread(target=self._main, name="kv-transfer", daemon=True)

    # --- any thread ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; commands given before are performed then."""
        self._thread.start()

    def submit(self, push: Push) -> None:
        """Queue a push. Raises `InvariantViolated` for an id still alive, `TransferError` after `stop`."""
        with self._lock:
            self._require_running()
            if push.id in self._ids:
                raise InvariantViolated(f"push {push.id} was submitted while an earlier one of that id lives")
            self._ids.add(push.id)
            self._commands.append(_Submit(push))
        self._wake()

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        """Meet a peer. The answer is `PeerConnected`, or `PeerFailed` with the reason; none to an older epoch
        than the one that is known."""
        self._command(_Connect(peer, epoch, fingerprint, metadata))

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        """Forget a peer whose process is gone for certain; its unfinished pushes end as FAILED.

        With an epoch, a newer process of that peer is left alone.
        """
        self._command(_Disconnect(peer, epoch))

    def stop(self) -> None:
        """Ask the thread to end: commands given before are performed, then the backend is closed and every
        unfinished push ended. Returns at once; may be called twice."""
        with self._lock:
            self._stopping = True
        if self._thread.ident is not None:
            self._wake()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread to end, after `stop`. False when it has not within `timeout_s`."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _command(self, command: _Command) -> None:
        with self._lock:
            self._require_running()
            self._commands.append(command)
        self._wake()

    def _require_running(self) -> None:
        if self._stopping or self._ended:
            raise TransferError("the transfer service has stopped")

    def _wake(self) -> None:
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    # --- the transfer thread ------------------------------------------------------------------------

    def _main(self) -> None:
        error = ""
        try:
            self._loop()
        except (
            Exception
        ) as failure:  # the thread's outermost loop: a worker must hear that it can move nothing
            log.exception("transfer thread failed")
            error = f"{type(failure).__name__}: {failure}"
        try:
            self._backend.close()
        except TransferError as failure:
            error = error or str(failure)
        with self._lock:
            self._ended = True
            late = [c.push for c in self._commands if isinstance(c, _Submit)]
            self._commands.clear()
            os.close(self._wake_fd)
        for push in late:
            self._live[push.id] = Sending(push=push)
        why = error or "the transfer service stopped"
        for sending in list(self._live.values()):
            sending.give_up(why)
            self._end(sending)
        self._on_event(TransferStopped(error=error))

    def _loop(self) -> None:
        waiter = Waiter(self._wake_fd, self._backend.wake_fds)
        quiet_polls = 0
        try:
            while True:
                commands, stopping = self._take()
                for command in commands:
                    self._perform(command)
                worked = self._start_some() or bool(commands)
                now = self._clock()
                for event in self._backend.poll(now):
                    worked = True
                    self._handle(event)
                if now >= self._next_deadline:
                    self._expire(now)
                if stopping:
                    return
                quiet_polls = 0 if worked else quiet_polls + 1
                if worked:
                    waiter.saw_event(now)
                    continue
                waiter.wait(self._wait_s(now, quiet_polls), now)
        finally:
            waiter.close()

    def _wait_s(self, now: float, quiet_polls: int) -> float | None:
        """How long to sleep: not at all, until something wakes us, or at most so many seconds."""
        wait = self._backend.max_wait_s(now)
        if self._whose:
            patient = patience(quiet_polls)
            wait = patient if wait is None else min(wait, patient)
        if self._next_deadline < float("inf"):
            left = max(0.0, self._next_deadline - now)
            wait = left if wait is None else min(wait, left)
        return wait

    def _take(self) -> tuple[list[_Command], bool]:
        with self._lock:
            commands = list(self._commands)
            self._commands.clear()
            return commands, self._stopping

    def _perform(self, command: _Command) -> None:
        match command:
            case _Submit(push):
                self._enqueue(push)
            case _Connect(peer, epoch, fingerprint, metadata):
                try:
                    self._backend.connect(peer, epoch, fingerprint, metadata)
                except TransferError as error:
                    self._handle(PeerFailed(peer=peer, error=str(error)))
            case _Disconnect(peer, epoch):
                # Queued pushes fail in `submit` when the peer is unknown by then, so order is kept.
                self._backend.disconnect(peer, epoch)
            case _:
                assert_never(command)

    def _enqueue(self, push: Push) -> None:
        sending = self._live[push.id] = Sending(push=push)
        route = self._backend.route(push.peer, push.group)
        try:
            require_push(push, self._backend.regions)
            if route is not None:
                route.require(push)
        except TransferError as error:
            sending.give_up(str(error))
            sending.began = self._clock()  # it counts as tried: FAILED
            self._end(sending)
            return
        sending.fragments.extend(fragments(push, route, self._fragment_bytes))
        sending.route, sending.size_bytes = route, 0 if route is None else route.size_bytes(push)
        queue = self._queues.get(push.peer)
        if queue is None:
            queue = self._queues[push.peer] = PeerQueue(
                max_inflight_bytes=self._max_inflight_bytes, quantum_bytes=self._fragment_bytes
            )
        queue.add(sending)
        self._next_deadline = min(self._next_deadline, push.deadline)

    def _start_some(self) -> bool:
        """Hand the backend one fragment per peer that has room; False when there was nothing to start."""
        started = False
        for peer, queue in list(self._queues.items()):
            taken = queue.take()
            if taken is not None:
                started = True
                self._start(*taken)
            elif queue.idle:
                del self._queues[peer]
        return started

    def _start(self, sending: Sending, fragment: Fragment) -> None:
        push, route = sending.push, sending.route
        if not sending.started:
            sending.began = self._clock()
            if route is not None:
                sending.digest = self._verifier.digest(push.peer, self._backend.path(push.peer))
        if sending.digest is not None and route is not None:
            self._verifier.add(sending.digest, fragment.push, route)
        whole = fragment.last and not sending.bytes_moved
        fragment_id = push.id if whole else next(self._fragment_ids)
        note = seal(push, route, sending.digest) if fragment.last and push.note is not None else None
        sending.under_way[fragment_id] = fragment.size_bytes
        self._whose[fragment_id] = sending
        self._backend.submit(dataclasses.replace(fragment.push, id=fragment_id, note=note))

    def _handle(self, event: TransferEvent) -> None:
        match event:
            case PushEnded():
                self._fragment_ended(event)
            case NoteArrived():
                self._on_event(self._verifier.open(event))
            case PeerConnected():
                log.info("to %s: %s", event.peer, event.path)
                self._on_event(event)
            case PeerFailed(peer=peer, error=error):
                self._on_event(event)
                queue = self._queues.get(peer)
                self._give_up([] if queue is None else queue.waiting(), error)
            case _:
                self._on_event(event)

    def _fragment_ended(self, event: PushEnded) -> None:
        sending = self._whose.pop(event.id, None)
        if sending is None:
            log.error("a second end of push %d was ignored: %s %s", event.id, event.outcome, event.error)
            return
        size_bytes = sending.under_way.pop(event.id)
        self._queues[sending.push.peer].inflight_bytes -= size_bytes
        sending.bytes_moved += event.bytes_moved
        sending.seconds += event.seconds
        if event.outcome is not Outcome.COMPLETED:
            sending.give_up(event.error or event.outcome.value)
        if sending.over:
            self._end(sending)

    def _give_up(self, sendings: Sequence[Sending], why: str) -> None:
        """Start no more of them; those with nothing under way end now, the others when that does."""
        for sending in sendings:
            sending.give_up(why)
            if sending.over and sending.push.id in self._live:
                if not sending.started and not sending.timed_out:
                    sending.began = self._clock()
                self._end(sending)

    def _expire(self, now: float) -> None:
        for sending in list(self._live.values()):
            if sending.timed_out or now < sending.push.deadline:
                continue
            sending.timed_out = True
            why = f"not terminal at its deadline, {'under way' if sending.started else 'still waiting'}"
            self._on_event(PushEnded(id=sending.push.id, outcome=Outcome.TIMED_OUT, error=why))
            if sending.fragments:
                self._give_up([sending], why)
        open_ones = (s.push.deadline for s in self._live.values() if not s.timed_out)
        self._next_deadline = min(open_ones, default=float("inf"))

    def _end(self, sending: Sending) -> None:
        """Its one terminal event. A sum of fragments' times that overlapped is cut to what really passed."""
        push_id = sending.push.id
        for fragment_id in sending.under_way:
            self._whose.pop(fragment_id, None)
        del self._live[push_id]
        with self._lock:
            self._ids.discard(push_id)
        if not sending.error:
            outcome = Outcome.COMPLETED
        else:
            outcome = Outcome.FAILED if sending.started else Outcome.CANCELLED
        elapsed = 0.0 if sending.began is None else self._clock() - sending.began
        many = sending.bytes_moved > self._fragment_bytes
        self._on_event(
            PushEnded(
                id=push_id,
                outcome=outcome,
                bytes_moved=sending.bytes_moved if outcome is Outcome.COMPLETED else 0,
                seconds=min(sending.seconds, elapsed) if many else sending.seconds,
                error=sending.error,
            )
        )
