"""The life of every request, as a pure state machine: events in, actions out, no clock and no I/O of its own.

What a sample goes through (see `pdserve.core.lifecycle` for the phases):

    Submit -> waiting -> placed: StartDecode(D) -> Reserved -> StartPrefill(P) -> PrefillDone -> KvArrived
                 ^          |         '-- Refused: another D, or wait for room         |             |
                 |          '--> the attempt fails or a worker is lost <---------------'-------------'
                 '--------------------------'  a new epoch, with the tokens streamed so far

Every sample that was submitted ends with exactly one `End`. Whatever an attempt had placed on a worker is
taken back by `Cancel`, and the decode worker hears `PushesSettled` once no write of it can land any more.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Final, assert_never

from coordinator import admission, endings, fetching, moving, orphans, placing, preempting, progress, roles
from coordinator.book import Book, RegistrySettings
from coordinator.decisions import Decision, DecisionLog
from coordinator.events import (
    Action,
    Broken,
    ChangeWorkerRole,
    ClientCancelled,
    DrainWorker,
    Event,
    FromWorker,
    NewRequest,
    Send,
    StopMatched,
    Submit,
    Tick,
    UndrainWorker,
    WorkerDown,
    WorkerGone,
    WorkerJoined,
)
from coordinator.failures import failure_of
from coordinator.fetch_tally import FetchTally
from coordinator.fleet import Fleet, WorkerState
from coordinator.flight import Attempt, Flight
from coordinator.latency import LatencyModel
from coordinator.router import Router
from coordinator.stories import Story
from pdserve.core.errors import DeadlineExceeded, NoWorkers, WorkerLost
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.lifecycle import Phase, RequestRecord
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    Drain,
    DropPeer,
    Heartbeat,
    Hello,
    KvArrived,
    Orphaned,
    Preempted,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    Refused,
    Reserved,
    Role,
    RoleChanged,
    SendPrefixes,
    Tokens,
    TransferDone,
    Undrain,
    Up,
    WorkerInfo,
)
from pdserve.core.prefix import keys_of
from pdserve.core.worker_state import PrefixEvents

TICK_S: Final = 0.25
"""Longest time between two `Tick`s."""


class Registry:
    def __init__(self, settings: RegistrySettings, router: Router) -> None:
        self._book = Book(settings=settings, router=router)
        self._deadlines: list[tuple[float, int, RequestId]] = []
        self._order = 0

    # --- what others may ask ------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        return self._book.fleet

    @property
    def decisions(self) -> DecisionLog:
        """Why the last requests went where they went."""
        return self._book.decisions

    @property
    def num_active(self) -> int:
        return len(self._book.flights)

    @property
    def num_waiting(self) -> int:
        return self._book.num_waiting

    @property
    def num_fetching(self) -> int:
        """Requests that wait for the beginning of their prompt to come from another worker."""
        return len(self._book.fetches)

    @property
    def fetched(self) -> FetchTally:
        """What became of these, since start."""
        return self._book.fetched

    @property
    def num_unsettled(self) -> int:
        """Attempts that may still have writes in flight, also of requests that have ended."""
        return len(self._book.pushes)

    def story(self, request: RequestId | None) -> tuple[Story, tuple[Decision, ...]] | None:
        """What happened to one of the last requests, and the decisions about it; None: the last that came."""
        book = self._book
        story = book.stories.last() if request is None else book.stories.get(request)
        return None if story is None else (story, book.decisions.of(story.request.id))

    @property
    def num_remembered(self) -> int:
        return len(self._book.stories)

    def current_attempt(self, request: RequestId) -> Attempt | None:
        flight = self._book.flights.get(request)
        return None if flight is None else flight.attempt

    def is_active(self, request: RequestId) -> bool:
        return request in self._book.flights

    def phases(self) -> dict[Phase, int]:
        """How many requests are in each phase; phases without any are left out."""
        counts: dict[Phase, int] = {}
        for flight in self._book.flights.values():
            counts[flight.record.phase] = counts.get(flight.record.phase, 0) + 1
        return counts

    def next_tick(self, now: float) -> float:
        """When `Tick` is wanted next, on the registry's clock."""
        times = [now + TICK_S, *self._book.ending.values()]
        if self._deadlines:
            times.append(self._deadlines[0][0])
        return min(times)

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """What is to be done about `event`. `now` is monotonic, in seconds."""
        actions = self._handle(event, now)
        worker = event.worker if isinstance(event, FromWorker) else _worker_of(event)
        if worker is not None:
            self._book.note_draining(worker)
        if self._book.draining:
            actions += moving.move_away(self._book, now)
        # Any event may have made room, or a request wait.
        return actions + placing.place_waiting(self._book, now)

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case FromWorker():
                return self._from_worker(event, now)
            case Submit():
                return self._submit(event.samples, now)
            case ClientCancelled():
                flight = self._book.flights.get(event.request)
                return [] if flight is None else endings.cancel(self._book, flight, event.reason, now)
            case StopMatched():
                flight = self._book.flights.get(event.request)
                return [] if flight is None else endings.stop(self._book, flight, now)
            case Broken():
                flight = self._book.flights.get(event.request)
                return [] if flight is None else endings.fail(self._book, flight, event.error, now)
            case WorkerJoined():
                return self._worker_joined(event, now)
            case WorkerDown():
                return self._worker_down(event.worker, event.epoch, event.why, now)
            case WorkerGone():
                return self._worker_gone(event, now)
            case DrainWorker():
                return self._drain(event, now)
            case ChangeWorkerRole():
                return roles.change(self._book, event, now)
            case UndrainWorker():
                return self._undrain(event)
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def _submit(self, samples: tuple[NewRequest, ...], now: float) -> list[Action]:
        leader = samples[0]
        decoders = self.fleet.pool(leader.model, Role.DECODE).first_up(1)
        if not decoders:
            self._book.no_decode_since.setdefault(leader.model, now)
        # The others wait for the first where its prefix, once cached, saves them reading the prompt again.
        share = bool(decoders) and len(leader.tokens) > decoders[0].info.block_tokens
        error = admission.refusal(self._book, samples, now)
        actions: list[Action] = []
        if error is None:
            actions += admission.make_room_in_queue(self._book, leader, now)
        for request in samples:
            flight = self._take_in(request, now)
            if error is not None:
                actions += endings.end(self._book, flight, Phase.REJECTED, error, now)
                continue
            admission.admitted(self._book, flight, now)
            if share and request is not leader:
                flight.leader = leader.id
                self._book.followers.setdefault(leader.id, []).append(flight.id)
            else:
                self._book.enqueue(flight)
        return actions

    def _take_in(self, request: NewRequest, now: float) -> Flight:
        self._order += 1
        record = RequestRecord(id=request.id, created=request.arrived, attempt=request.first_epoch)
        flight = Flight(request=request, record=record, order=self._order, submitted=now)
        if self._book.settings.explain_last:
            flight.story = self._book.stories.begin(
                Story(
                    request=dataclasses.replace(request, tokens=[]),
                    prompt_tokens=len(request.tokens),
                    history=record.history,
                    legs=flight.legs,
                )
            )
        self._book.flights[request.id] = flight
        heapq.heappush(self._deadlines, (request.deadline, self._order, request.id))
        return flight

    # --- messages of workers ------------------------------------------------------------------------

    def _from_worker(self, event: FromWorker, now: float) -> list[Action]:
        state = self.fleet.up(event.worker, event.epoch)
        if state is None:
            return []  # its connection was given up
        message = event.message
        if isinstance(message, Heartbeat):
            state.heard(message)
            roles.heard(self._book, state, message.role)
            return []
        if isinstance(message, RoleChanged):
            return roles.changed(self._book, message)
        if isinstance(message, (Hello, WorkerInfo)):
            return []
        if isinstance(message, PrefixEvents):
            return self._prefix_events(message)
        if isinstance(message, Orphaned):
            return orphans.reported(self._book, event.worker, message)
        flight = self._book.flights.get(message.attempt.request)
        actions: list[Action] = []
        fetch = self._book.fetches.get(message.attempt)
        if fetch is not None:
            actions = fetching.heard(self._book, fetch, event.worker, message, now)
        elif flight is not None and flight.moving is not None and flight.moving.id == message.attempt:
            actions = moving.heard(self._book, flight, flight.moving, event.worker, message, now)
        # Anything of an older attempt is late and means nothing, but for the end of its pushes.
        elif flight is not None and flight.attempt is not None and flight.attempt.id == message.attempt:
            actions = self._of_attempt(flight, flight.attempt, event.worker, message, now)
        if isinstance(message, TransferDone):
            fetching.moved(self._book, event.worker, message)
        if isinstance(message, (TransferDone, PushesSettled)):
            actions += progress.settled(self._book, message.attempt, event.worker, flight, now)
        return actions

    def _prefix_events(self, message: PrefixEvents) -> list[Action]:
        book, known = self._book, True
        for index, stored, evicted in (
            (book.prefixes, message.stored, message.evicted),
            (book.tiers, message.tier_stored, message.tier_evicted),
        ):
            known &= index.heard(
                message.worker,
                message.sequence,
                keys_of(stored),
                keys_of(evicted),
                snapshot=message.snapshot,
            )
        if known:
            return []
        return [Send(worker=message.worker, message=SendPrefixes(after=message.sequence))]

    def _of_attempt(
        self, flight: Flight, attempt: Attempt, worker: WorkerId, message: Up, now: float
    ) -> list[Action]:
        """A message about a request's current attempt. One that is not its sender's to say is ignored."""
        by_decode, by_reader = worker == attempt.decode, worker == (attempt.prefill or attempt.decode)
        match message:
            case Tokens() if by_decode:
                return progress.tokens(self._book, flight, attempt, message, now)
            case Reserved() if by_decode:
                return placing.reserved(self._book, flight, attempt, message, now)
            case Refused() if by_decode:
                return placing.refused(self._book, flight, attempt, message, now)
            case KvArrived() if by_decode:
                progress.kv_arrived(self._book, flight, attempt, now)
            case PrefillStarted() if by_reader:
                return progress.prefill_started(self._book, flight, attempt, message, now)
            case PrefillProgress() if by_reader:
                return progress.prefill_progress(self._book, flight, attempt, message, now)
            case PrefillDone() if by_reader:
                return progress.prefill_done(self._book, flight, attempt, message, now)
            case TransferDone() if worker == attempt.prefill:
                progress.transferred(self._book, attempt, message)
            case Preempted() if by_decode:
                return preempting.preempted(self._book, flight, worker, now)
            case AttemptFailed() if by_decode or (by_reader and not attempt.kv_arrived):
                # While its KV is awaited, either side or what is between them may be at fault.
                blame = (worker,) if attempt.kv_arrived else (attempt.decode, attempt.prefill)
                return endings.attempt_failed(
                    self._book,
                    flight,
                    failure_of(message, worker),
                    now,
                    retryable=message.retryable,
                    reporter=worker,
                    blame=blame,
                )
            case _:
                pass
        return []

    # --- workers ------------------------------------------------------------------------------------

    def _worker_joined(self, event: WorkerJoined, now: float) -> list[Action]:
        info = event.info
        actions: list[Action] = []
        known = self.fleet.get(info.worker)
        same_process = known is not None and known.info.epoch == info.epoch
        if known is not None and same_process:
            # Its connection was made again; what it ran for the old one it has given up.
            actions += self._worker_down(info.worker, info.epoch, "its connection was made again", now)
        elif known is not None:
            # A worker is replaced only after the process before it has ended.
            gone = WorkerGone(worker=info.worker, epoch=known.info.epoch, why="replaced")
            actions += self._worker_gone(gone, now)
        alike = self.fleet.of(event.model, info.role)
        state = WorkerState(
            info=info, model=event.model, latency=LatencyModel(alike[0].latency if alike else None)
        )
        state.latency.profiled(info.profile)
        if known is not None and same_process:
            state.drain_asked, state.drain_until = known.drain_asked, known.drain_until
            state.draining = state.drain_asked
        self.fleet.add(state)
        if info.role is Role.DECODE:
            self._book.no_decode_since.pop(event.model, None)
        for peer in self._peers_of(state):
            actions += endings.introductions(info, peer.info)
        actions += roles.joined(self._book, state, known)
        for flight in self._book.flights.values():
            flight.failed_on.discard(info.worker)  # that was another process
        if same_process:
            # Whatever it said last of these may have been lost with the connection.
            for attempt in self._book.pushes.of_writer(info.worker):
                asked = Cancel(attempt=attempt, reason="its connection was made again")
                actions.append(Send(worker=info.worker, message=asked))
        return actions + orphans.writer_joined(self._book, state)

    def _peers_of(self, state: WorkerState) -> list[WorkerState]:
        """Workers that push to it, or that it pushes to; decode workers meet when a request shall move."""
        other = Role.DECODE if state.info.role is Role.PREFILL else Role.PREFILL
        return self.fleet.of(state.model, other)

    def _drain(self, event: DrainWorker, now: float) -> list[Action]:
        state = self.fleet.up(event.worker)
        if state is None:
            return []
        timeout_s = self._book.settings.drain_timeout_s if event.timeout_s is None else event.timeout_s
        state.draining = state.drain_asked = True
        state.drain_until = now + timeout_s
        return [Send(worker=event.worker, message=Drain())]

    def _undrain(self, event: UndrainWorker) -> list[Action]:
        state = self.fleet.up(event.worker)
        if state is None:
            return []
        # Until it has heard, it refuses as one that drains: its heartbeats say when it takes requests again.
        state.drain_asked, state.drain_until = False, None
        return [Send(worker=event.worker, message=Undrain())]

    def _worker_down(self, worker: WorkerId, epoch: int, why: str, now: float) -> list[Action]:
        state = self.fleet.up(worker, epoch)
        if state is None:
            return []
        state.up = False
        self._book.prefixes.forget(worker)
        self._book.tiers.forget(worker)
        if not self.fleet.of(state.model, Role.DECODE):
            self._book.no_decode_since.setdefault(state.model, now)
        actions: list[Action] = []
        error = WorkerLost(worker, why)
        for flight in list(self._book.flights.values()):
            attempt = flight.attempt
            if attempt is None:
                continue
            if flight.moving is not None and worker == flight.moving.decode:
                actions += moving.fell_through(self._book, flight, str(error), now, reporter=None)
            reads = worker == attempt.prefill and not attempt.kv_arrived
            if reads or worker == attempt.decode:
                actions += endings.attempt_failed(
                    self._book, flight, error, now, retryable=True, reporter=worker, blame=(worker,)
                )
        return actions + fetching.worker_lost(self._book, worker, now)

    def _worker_gone(self, event: WorkerGone, now: float) -> list[Action]:
        state = self.fleet.get(event.worker, event.epoch)
        if state is None:
            return []
        actions = self._worker_down(event.worker, event.epoch, event.why, now)
        self.fleet.forget(event.worker)
        self._book.pushes.worker_gone(event.worker)
        drop = DropPeer(peer=event.worker, epoch=event.epoch)
        peers = self._peers_of(state)
        if state.info.role is Role.DECODE:
            peers += self.fleet.of(state.model, Role.DECODE)
        else:
            gone = (state.id, state.info.epoch)
            peers += [w for w in self.fleet.of(state.model, Role.PREFILL) if gone in w.met]
        return actions + [Send(worker=peer.id, message=drop) for peer in peers]

    # --- time ---------------------------------------------------------------------------------------

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, request = heapq.heappop(self._deadlines)
            flight = self._book.flights.get(request)
            if flight is not None and flight.order == order and flight.ending is None:
                limit = flight.request.deadline - flight.record.created
                error = DeadlineExceeded(f"request {flight.id}: not finished within {limit:.3f} s")
                actions += endings.fail(self._book, flight, error, now)
        for request in [request for request, until in self._book.ending.items() if until <= now]:
            flight = self._book.flights[request]
            if flight.ending is not None:
                actions += endings.finish(self._book, flight, flight.ending, now, reporter=None)
        actions += progress.renew_leases(self._book, now)
        actions += admission.expire(self._book, now)
        actions += fetching.expire(self._book, now)
        for model, since in self._book.no_decode_since.items():
            if now - since >= self._book.settings.no_workers_wait_s:
                for request in self._book.waiting.get(model, ()):
                    absent = NoWorkers(Role.DECODE, model)
                    actions += endings.fail(self._book, self._book.flights[request], absent, now)
        return actions


def _worker_of(event: Event) -> WorkerId | None:
    match event:
        case WorkerJoined(info=info):
            return info.worker
        case (
            DrainWorker(worker=worker)
            | UndrainWorker(worker=worker)
            | ChangeWorkerRole(worker=worker)
            | WorkerGone(worker=worker)
            | WorkerDown(worker=worker)
        ):
            return worker
        case _:
            return None
