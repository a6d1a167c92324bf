"""Batch work gives way: a request that would miss its TTFT target for want of room takes others' room. Pure.

    no decode worker has room -> Preempt to the worker where the fewest must go -> Preempted: they are queued
    again, each as a new attempt with the tokens it has, and the room is the waiting request's

Only requests whose class says so are interrupted, by a more urgent priority, while they write their answers,
and each a few times at most. What was streamed stays streamed; the answer goes on with the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coordinator import endings
from coordinator.book import Book
from coordinator.events import Action, Send
from coordinator.fleet import WorkerState
from coordinator.flight import Flight
from coordinator.sla import Goal, soonest_s
from coordinator.waiting import WaitingQueue
from pdserve.core.ids import WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Preempt, Role

_AT_ONCE: Final = 8
"""Waiting requests, from the first in turn on, for which room is made at the same time."""
_PATIENCE: Final = 3.0
"""Room is expected after so many of the gaps between two ends of late; who can wait for that waits."""
ASK_AGAIN_S: Final = 1.0
"""After a worker was asked to interrupt a request, and nothing came of it."""


def make_room(book: Book, queue: WaitingQueue, now: float) -> list[Action]:
    """For those first in turn that cannot wait for room any longer."""
    if not book.settings.preemption:
        return []
    actions: list[Action] = []
    for request in queue.first(_AT_ONCE):
        flight = book.flights[request]
        if now < flight.room_check_at:
            continue
        slack_s = _slack_s(book, flight, now) - _PATIENCE / book.ended_per_s
        if slack_s > 0:
            flight.room_check_at = now + slack_s
            continue
        flight.room_check_at = now + ASK_AGAIN_S
        for victim in _victims(book, flight, now):
            victim.asked_to_go_at = now
            victim.note(now, f"asked to give way to {flight.id}")
            flight.note(now, f"waits for {victim.id} to give way")
            attempt = victim.attempt
            assert attempt is not None
            actions.append(Send(worker=attempt.decode, message=Preempt(attempt=attempt.id)))
    return actions


def preempted(book: Book, flight: Flight, worker: WorkerId, now: float) -> list[Action]:
    """Its worker has given it up: it goes on later, ahead of those of its class that came after it."""
    if flight.ending is not None or flight.moving is not None:
        return []
    flight.preemptions += 1
    return endings.start_over(book, flight, "it gave way to a more urgent request", now, reporter=worker)


def _slack_s(book: Book, flight: Flight, now: float) -> float:
    """How long it can still wait for room and have its first token in time; infinite without a target."""
    if flight.output:
        return float("inf")  # its TTFT is history
    readers = book.router.readers(book.fleet, flight.request.model)
    return flight.due - now - soonest_s(readers, flight.num_tokens, Goal(due=flight.due), deviations=0.0)


def _victims(book: Book, flight: Flight, now: float) -> Sequence[Flight]:
    """The fewest, at one worker, that make room for it; of these, what is least work to read again."""
    best: Sequence[Flight] = ()
    for worker in book.fleet.of(flight.request.model, Role.DECODE):
        if worker.draining or not worker.full:
            continue  # or it only has not answered yet
        chosen = _victims_at(book, worker, flight, now)
        if chosen and (not best or _loss(chosen) < _loss(best)):
            best = chosen
    return best


def _victims_at(book: Book, worker: WorkerState, flight: Flight, now: float) -> Sequence[Flight]:
    size = worker.info.block_tokens
    missing = blocks_for(flight.num_tokens + 1, size) - _free_blocks(worker)
    running = [f for a in worker.blocks_placed if (f := book.flights.get(a.request)) is not None]
    willing = [f for f in running if _may_be_interrupted(book, f, flight, worker.id, now)]
    willing.sort(key=lambda f: (-f.request.priority, f.num_tokens))
    chosen: list[Flight] = []
    for victim in willing:
        chosen.append(victim)
        missing -= blocks_for(victim.num_tokens, size)
        if missing <= 0:
            return chosen
    return ()


def _may_be_interrupted(book: Book, victim: Flight, by: Flight, at: WorkerId, now: float) -> bool:
    return (
        victim.request.preemptible
        and victim.request.priority > by.request.priority
        and victim.record.phase is Phase.DECODING
        and victim.ending is None
        and victim.moving is None
        and victim.attempt is not None
        and victim.attempt.decode == at
        and victim.preemptions < book.settings.max_preemptions
        and now - victim.asked_to_go_at >= ASK_AGAIN_S
    )


def _free_blocks(worker: WorkerState) -> int:
    """As far as is known: what is placed there, and what its last heartbeat said."""
    free = worker.info.num_blocks - sum(worker.blocks_placed.values())
    if worker.heartbeat is None:
        return max(free, 0)
    return max(min(free, worker.heartbeat.blocks.free + worker.heartbeat.blocks.cached), 0)


def _loss(victims: Sequence[Flight]) -> tuple[int, int]:
    return len(victims), sum(victim.num_tokens for victim in victims)
