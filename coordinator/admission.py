"""Who is refused, when, and why: at once, what cannot be served in time or is more than a tenant may ask; and
later, what has waited too long without having begun. A request that has begun is never refused.

    arrival      tenant's limits -> room in the queue -> deadline -> blocks -> TPOT target -> TTFT target
    in the queue queue_ttl_s; when the queue is full, the least urgent gives way to a more urgent arrival
    its turn     with admission ttft or targets: a promise that cannot be kept any more is taken back
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Final

from coordinator import endings
from coordinator.book import Book
from coordinator.decisions import Placement
from coordinator.events import Action, NewRequest
from coordinator.fleet import WorkerState
from coordinator.flight import Flight
from coordinator.pool import SAMPLE, WHOLE
from coordinator.sla import EVIDENCE, Goal, soonest_s
from pdserve.core.config import Admission, RoutingPolicy
from pdserve.core.errors import BlockPoolExhausted, DeadlineExceeded, Overload, Overloaded, PdServeError
from pdserve.core.layout import blocks_for
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Role

_DEADLINE_DEVIATIONS: Final = -2.0
_TARGET_DEVIATIONS: Final = 1.0
_SHORTEST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 30.0


def refusal(book: Book, samples: Sequence[NewRequest], now: float) -> PdServeError | None:
    """Why a request is not even queued. Its samples are alike, and are taken or refused together."""
    request = samples[0]
    tokens = sum(map(book.cost, samples))
    queued = sum(queue.num_of(request.tenant) for queue in book.waiting.values())
    return (
        book.tenants.refusal(request.tenant, count=len(samples), tokens=tokens, queued=queued, now=now)
        or _queue_is_full(book, request)
        or _impossible(book, request, now)
        or _too_slow(book, request)
        or hopeless(book, request, now)
    )


def admitted(book: Book, flight: Flight, now: float) -> None:
    """It counts as its tenant's from now on, and has only so long to begin."""
    request = flight.request
    flight.charged = book.cost(request)
    flight.note(
        now,
        f"admitted: about {flight.charged:.0f} tokens; {book.num_waiting} waiting, "
        f"{len(book.flights) - 1} others in all",
    )
    book.tenants.admitted(request.tenant, tokens=flight.charged, now=now)
    ttl_s = request.queue_ttl_s or book.settings.queue_ttl_s
    if ttl_s is not None:
        heapq.heappush(book.expiries, (request.arrived + ttl_s, flight.order, flight.id))


# --- the queue ----------------------------------------------------------------------------------------


def _queue_is_full(book: Book, request: NewRequest) -> Overloaded | None:
    limit = book.settings.max_queued_requests
    if book.num_waiting < limit or _gives_way(book, request.priority) is not None:
        return None
    why = f"{limit} requests are waiting already, the most allowed"
    return Overloaded(why, retry_after_s=_until_room_s(book), why=Overload.QUEUE_FULL)


def make_room_in_queue(book: Book, request: NewRequest, now: float) -> list[Action]:
    """The least urgent that has not begun is refused, where a more urgent one would be otherwise."""
    if book.num_waiting < book.settings.max_queued_requests:
        return []
    victim = _gives_way(book, request.priority)
    if victim is None:
        return []
    why = f"request {victim.id}: the queue is full, and a more urgent request came"
    error = Overloaded(why, retry_after_s=_until_room_s(book), why=Overload.QUEUE_FULL)
    return _refuse(book, victim, error, now)


def _gives_way(book: Book, priority: int) -> Flight | None:
    late = [
        flight
        for queue in book.waiting.values()
        for flight in map(book.flights.__getitem__, queue.less_urgent(priority))
        if not _has_begun(flight)
    ]
    return max(late, key=lambda f: (f.request.priority, f.order), default=None)


def expire(book: Book, now: float) -> list[Action]:
    """Refuse what has waited too long without having begun."""
    actions: list[Action] = []
    while book.expiries and book.expiries[0][0] <= now:
        _, order, request = heapq.heappop(book.expiries)
        flight = book.flights.get(request)
        if flight is None or flight.order != order or _has_begun(flight):
            continue
        if flight.record.phase is not Phase.QUEUED or flight.leader is not None:
            continue
        waited_s = now - flight.record.created
        why = f"request {request}: it has waited {waited_s:.1f} s without having begun"
        error = Overloaded(why, retry_after_s=_until_room_s(book), why=Overload.QUEUE_TTL)
        actions += _refuse(book, flight, error, now)
    return actions


def _refuse(book: Book, flight: Flight, error: Overloaded, now: float) -> list[Action]:
    return endings.end(book, flight, Phase.REJECTED, error, now)


def _has_begun(flight: Flight) -> bool:
    """Some of its answer may be out, or work was done for it."""
    return bool(flight.output) or flight.record.attempt > flight.request.first_epoch or flight.retries > 0


def _until_room_s(book: Book) -> float:
    return _bounded(book.num_waiting / book.ended_per_s)


# --- what can be known at once ------------------------------------------------------------------------


def _impossible(book: Book, request: NewRequest, now: float) -> PdServeError | None:
    if request.deadline <= now:
        return DeadlineExceeded(f"request {request.id}: its deadline had passed when it arrived")
    largest = largest_decoder(book, request.model)
    if largest is not None:
        wanted = blocks_for(len(request.tokens) + 1, largest.info.block_tokens)
        if wanted > largest.info.num_blocks:
            return BlockPoolExhausted(wanted=wanted, free=largest.info.num_blocks)
    return None


def largest_decoder(book: Book, model: str) -> WorkerState | None:
    return book.fleet.pool(model, Role.DECODE).largest_up()


def _too_slow(book: Book, request: NewRequest) -> Overloaded | None:
    """No worker writes a token in the time asked for, not even with nothing else to do."""
    target_s = request.tpot_target_s
    if target_s is None or not _keeps_targets(book, Admission.TARGETS):
        return None
    best_s = math.inf
    for worker in book.fleet.pool(request.model, Role.DECODE).first_up(WHOLE):
        fit, alone = worker.latency.decode, (1.0, 1.0, float(len(request.tokens)))
        if fit.count < EVIDENCE:
            return None
        best_s = min(best_s, fit.predict(alone) - fit.std(alone))
        if best_s <= target_s:
            return None
    if math.isinf(best_s):
        return None
    why = f"request {request.id}: the fastest worker takes {best_s * 1e3:.1f} ms per token when it is idle"
    why += f", its TPOT target is {target_s * 1e3:.1f} ms"
    return Overloaded(why, retry_after_s=_LONGEST_WAIT_S, why=Overload.TPOT_TARGET)


def hopeless(book: Book, request: NewRequest, now: float) -> Overloaded | None:
    """Why no placement can give the first token in time, and when it may be worth asking again.

    A deadline is fatal, so a request is refused only when even the hopeful end of the error bar is too late.
    A TTFT target is a promise: who is admitted shall be served in time, so there the other end counts.
    Nothing is refused while too little is known of a worker.
    """
    if not _keeps_targets(book, Admission.DEADLINE, Admission.TTFT, Admission.TARGETS):
        return None
    limit_s, what, deviations = request.deadline - now, Overload.DEADLINE, _DEADLINE_DEVIATIONS
    due = request.deadline
    if request.ttft_target_s is not None:
        due = request.arrived + request.ttft_target_s
        if _keeps_targets(book, Admission.TTFT, Admission.TARGETS) and due - now < limit_s:
            limit_s, what, deviations = due - now, Overload.TTFT_TARGET, _TARGET_DEVIATIONS
    queue_s = book.queue_wait_s(request.model, request.priority) * (1.0 if deviations > 0 else 0.5)
    margin = book.margins_of(request.model).ttft if what is Overload.TTFT_TARGET else 1.0
    enough_s = limit_s / margin - queue_s
    tokens, goal = len(request.tokens), Goal(due=due)
    for count in (1, SAMPLE):  # nearly always the least busy one is soon enough
        readers = book.router.readers(book.fleet, request.model, count)
        soonest = soonest_s(readers, tokens, goal, deviations=deviations, enough_s=enough_s)
        if soonest <= enough_s or soonest == 0:  # in time, or too little is known
            return None
    soonest = (soonest + queue_s) * margin
    reason = f"request {request.id}: its first token would take {soonest:.2f} s"
    limit = "TTFT target" if what is Overload.TTFT_TARGET else "deadline"
    reason += f", its {limit} is in {limit_s:.2f} s"
    return Overloaded(reason, retry_after_s=_bounded(soonest - limit_s), why=what)


# --- in its turn --------------------------------------------------------------------------------------


def broken_promise(book: Book, flight: Flight, placement: Placement, now: float) -> Overloaded | None:
    """Its first token would come too late by now, whoever read it, and nothing of it has begun."""
    route = placement.route
    if route is None or _has_begun(flight) or not _keeps_targets(book, Admission.TTFT, Admission.TARGETS):
        return None
    late_s = now + route.ttft_s * book.margins_of(flight.request.model).ttft - flight.due
    reader = book.fleet.get(route.prefill or route.decode)
    if late_s <= 0 or reader is None or reader.latency.prefill.count < EVIDENCE:
        return None
    why = f"request {flight.id}: after {now - flight.record.created:.2f} s in the queue"
    why += f" its first token would come {late_s:.2f} s after its TTFT target"
    return Overloaded(why, retry_after_s=_bounded(late_s), why=Overload.TTFT_TARGET)


def disturbs(book: Book, flight: Flight, worker: WorkerState | None) -> bool:
    """With it in the batch, answers that run there, or its own, would miss their TPOT targets."""
    if worker is None or not worker.num_decoding or not _keeps_targets(book, Admission.TARGETS):
        return False
    if worker.latency.num_steps < EVIDENCE:
        return False
    own_s = math.inf if flight.request.tpot_target_s is None else flight.request.tpot_target_s
    batch = worker.batch_with(flight.num_tokens)
    step_s = worker.latency.step_s(*batch) + worker.latency.reading_adds_s
    step_s += _TARGET_DEVIATIONS * worker.latency.decode.std((1.0, *batch))
    return step_s * book.margins_of(flight.request.model).tpot > min(own_s, worker.tpot_targets[0])


def _keeps_targets(book: Book, *modes: Admission) -> bool:
    return book.settings.admission in modes and book.router.policy == RoutingPolicy.SLA


def _bounded(wait_s: float) -> float:
    return min(max(wait_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)
