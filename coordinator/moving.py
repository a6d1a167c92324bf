"""Requests leave a decode worker that is drained, with their KV, for another that has room. Pure.

    DECODING on S --StartDecode--> T: Reserved --Migrate--> S: full blocks, then a pause and the hand-over
        ^                           '-- Refused, or anything fails: it goes on at S, and tries again --.
        '---------------------------- MIGRATING <-----------------------------------------------------'
                                          '--> KvArrived from T: DECODING on T, Cancel to S

The move is an attempt of its own, which becomes the request's with `KvArrived`. Until then the request runs
at the worker it had. A worker with the drain's deadline behind it gives its requests up: they start over.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from coordinator import endings, progress
from coordinator.account import Marks, close_leg
from coordinator.book import Book
from coordinator.decisions import Choice, Placement
from coordinator.events import Action, Send
from coordinator.failures import failure_of
from coordinator.fleet import WorkerState
from coordinator.flight import Attempt, Flight
from pdserve.core.ids import WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    KvArrived,
    Migrate,
    RefusalReason,
    Refused,
    Reserved,
    Role,
    StartDecode,
    Tokens,
    Up,
)

MOVES_AT_ONCE: Final = 8
"""From one worker. Full blocks travel while requests run on, so more would only lengthen each pause."""
MOVE_AGAIN_S: Final = 0.25
"""After a move came to nothing."""


def move_away(book: Book, now: float) -> list[Action]:
    """Begin the moves that can begin, for every worker that is being drained."""
    actions: list[Action] = []
    for source in [book.fleet.get(worker) for worker in book.draining]:
        if source is None or not (source.up and source.draining):
            continue
        if source.info.role is Role.PREFILL and not source.blocks_placed:
            continue  # it keeps no answer
        if source.drain_until is None:
            source.drain_until = now + book.settings.drain_timeout_s
        flights = _flights_on(book, source)
        if source.drain_until <= now:
            actions += _give_up(book, source, flights, now)
            continue
        moving = sum(flight.moving is not None for flight in flights)
        for flight in flights:
            if moving >= MOVES_AT_ONCE:
                break
            if _may_move(flight, now):
                offered = _offer(book, flight, source, now)
                moving += bool(offered)
                actions += offered
    return actions


def heard(
    book: Book, flight: Flight, moving: Attempt, worker: WorkerId, message: Up, now: float
) -> list[Action]:
    """A message about the attempt that a move is. One that is not its sender's to say is ignored."""
    by_target = worker == moving.decode
    match message:
        case Reserved() if by_target:
            return _reserved(book, flight, moving, message, now)
        case Refused() if by_target:
            return _refused(book, flight, moving, message, now)
        case KvArrived() if by_target:
            return _arrived(book, flight, moving, now)
        case Tokens() if by_target:
            arrived = _arrived(book, flight, moving, now)
            attempt = flight.attempt
            assert attempt is not None
            return arrived + progress.tokens(book, flight, attempt, message, now)
        case AttemptFailed() if by_target or worker == moving.prefill:
            why = str(failure_of(message, worker))
            return fell_through(book, flight, why, now, reporter=worker)
        case _:
            return []


def fell_through(
    book: Book, flight: Flight, why: str, now: float, *, reporter: WorkerId | None
) -> list[Action]:
    """It goes on where it is, and tries again a little later."""
    flight.move_after = now + MOVE_AGAIN_S
    return endings.abandon_move(book, flight, why, now, reporter=reporter)


def _flights_on(book: Book, source: WorkerState) -> list[Flight]:
    flights = (book.flights.get(attempt.request) for attempt in source.blocks_placed)
    return [f for f in flights if f is not None and f.attempt is not None and f.attempt.decode == source.id]


def _may_move(flight: Flight, now: float) -> bool:
    """It writes its answer, and is not about to move or to end."""
    idle = flight.moving is None and flight.ending is None and now >= flight.move_after
    return idle and flight.record.phase is Phase.DECODING and bool(flight.output)


def _offer(book: Book, flight: Flight, source: WorkerState, now: float) -> list[Action]:
    size = source.info.block_tokens
    choice = book.router.place_move(book.fleet, source, flight.num_tokens)
    target = None if choice is None else book.fleet.up(choice.worker)
    if choice is None or target is None:
        return []
    flight.record.attempt += 1
    flight.record.move_to(Phase.MIGRATING, now=now)
    flight.moving = Attempt(
        id=flight.record.attempt_id,
        placement=Placement(choice, Choice(source.id, (), "it runs there")),
        base=len(flight.output),
    )
    target.place_decode(flight.moving.id, flight.num_tokens, flight.request.tpot_target_s)
    spec = flight.spec()
    # Without the newest token: nobody has computed its KV.
    spec = dataclasses.replace(spec, tokens=spec.tokens[:-1])
    offer = StartDecode(spec=spec, prefill_worker=source.id, lease_s=book.settings.lease_s, ahead_tokens=size)
    met = (
        []
        if (target.id, target.info.epoch) in source.met
        else endings.introductions(source.info, target.info)
    )
    source.met.add((target.id, target.info.epoch))
    return [*met, Send(worker=target.id, message=offer)]


def _reserved(book: Book, flight: Flight, moving: Attempt, message: Reserved, now: float) -> list[Action]:
    target, attempt, source = book.fleet.up(moving.decode), flight.attempt, moving.prefill
    if target is None or attempt is None or source is None or moving.prefill_sent:
        return []
    target.reserved(moving.id)
    moving.prefill_sent = True
    book.leased[flight.id] = now
    book.pushes.opened(moving.id, source, target.id, target.info.epoch)
    order = Migrate(
        attempt=attempt.id,
        to=moving.id,
        num_tokens=len(flight.request.tokens) + moving.base - 1,
        decode_worker=target.id,
        decode_epoch=target.info.epoch,
        dst_blocks=message.blocks,
        dst_cached_tokens=message.cached_tokens,
        transfer_deadline_s=book.settings.transfer_deadline_s,
    )
    return [Send(worker=source, message=order)]


def _refused(book: Book, flight: Flight, moving: Attempt, message: Refused, now: float) -> list[Action]:
    target = book.fleet.up(moving.decode)
    actions = fell_through(book, flight, message.detail, now, reporter=moving.decode)
    if target is not None and message.reason is RefusalReason.DRAINING:
        target.draining = True
    elif target is not None:
        target.refused()
    return actions


def _arrived(book: Book, flight: Flight, moving: Attempt, now: float) -> list[Action]:
    """It runs at the target: the attempt that moved is over."""
    before = flight.attempt
    assert before is not None
    flight.moving = None
    target = book.fleet.get(moving.decode)
    if target is not None:
        target.decodes(moving.id)
    close_leg(book.fleet, flight, before, now)
    flight.attempt = dataclasses.replace(
        before,
        id=moving.id,
        placement=Placement(moving.placement.decode, None),
        base=moving.base,
        read_by=before.prefill or before.read_by,
        kv_arrived=True,
        marks=Marks(arrived=now, outputs_before=len(flight.output)),
    )
    flight.migrations += 1
    flight.record.move_to(Phase.DECODING, now=now)
    book.leased.pop(flight.id, None)
    book.release(before)
    if book.fleet.up(before.decode) is None:
        return []
    return [Send(worker=before.decode, message=Cancel(attempt=before.id, reason="it moved"))]


def _give_up(book: Book, source: WorkerState, flights: list[Flight], now: float) -> list[Action]:
    """The drain has lasted long enough: what is left starts over elsewhere, if there is an elsewhere."""
    others = book.fleet.of(source.model, Role.DECODE)
    if all(worker.draining for worker in others):
        return []
    why = f"worker {source.id} was drained"
    return [
        action
        for flight in flights
        if flight.ending is None
        for action in endings.start_over(book, flight, why, now)
    ]
