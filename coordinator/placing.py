"""From the queue to a decode worker's reserved blocks, and from there to the prefill worker."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from coordinator import admission, endings, fetching, preempting
from coordinator.book import Book
from coordinator.decisions import Placement
from coordinator.events import Action, Send
from coordinator.failures import refusal_of
from coordinator.fleet import WorkerState
from coordinator.flight import Attempt, Flight
from coordinator.sla import Goal
from coordinator.waiting import WaitingQueue
from pdserve.core.errors import InvalidRequest
from pdserve.core.ids import WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import RefusalReason, Refused, Reserved, Role, StartDecode, StartPrefill

_TRIES: Final = 4
"""To find a decode worker whose answers can bear one more beside them."""


def _will_never_fit(book: Book, flight: Flight, decode: WorkerState) -> bool:
    """Refused for want of blocks by the largest worker, with all of its blocks there to be had.

    Twice, since what is known of a worker's blocks is as old as its last heartbeat.
    """
    if decode.info.role is Role.PREFILL:
        return False  # it was to keep it; decode workers have not been asked
    largest = admission.largest_decoder(book, flight.request.model)
    if largest is None or decode.info.num_blocks < largest.info.num_blocks:
        return False
    flight.idle_refusals += decode.idle
    wanted = blocks_for(flight.num_tokens + 1, decode.info.block_tokens)
    return wanted > decode.info.num_blocks or flight.idle_refusals >= 2


def place_waiting(book: Book, now: float) -> list[Action]:
    """Offer waiting requests to decode workers, in turn, until none has room."""
    book.fleet.pairs.at(now)
    actions: list[Action] = []
    for queue in list(book.waiting.values()):
        if queue:
            actions += _place(book, queue, now)
    return actions


def _place(book: Book, queue: WaitingQueue, now: float) -> list[Action]:
    actions: list[Action] = []
    while (request := queue.peek()) is not None:
        flight = book.flights[request]
        if book.is_held(flight, now):
            break
        goal = flight.goal(now)
        placement = _undisturbing(book, flight, goal)
        if placement is None:
            actions += preempting.make_room(book, queue, now)
            break
        if admission.disturbs(book, flight, book.fleet.get(placement.decode.worker)):
            book.hold(flight, now)
            break
        broken = admission.broken_promise(book, flight, placement, now)
        if broken is not None:
            actions += endings.end(book, flight, Phase.REJECTED, broken, now)
            continue
        flight.predict(book.router.forecast(placement), now)
        book.decided(flight, placement, goal, now)
        queue.take(request)
        flight.attempt = Attempt(id=flight.record.attempt_id, placement=placement, base=len(flight.output))
        offer = _offer(book, flight, flight.attempt, now)
        actions += fetching.offered(book, flight, flight.attempt, offer, now)
    return actions


def _undisturbing(book: Book, flight: Flight, goal: Goal) -> Placement | None:
    """Where nobody's TPOT target is missed for it, if the router finds such a place in a few tries."""
    avoid = flight.failed_on
    placement = _route(book, flight, goal, avoid)
    for _ in range(_TRIES - 1):
        if placement is None:
            return None
        worker = book.fleet.get(placement.decode.worker)
        if placement.decode.worker in avoid or not admission.disturbs(book, flight, worker):
            return placement
        avoid = avoid | {placement.decode.worker}
        placement = _route(book, flight, goal, avoid)
    return placement


def _route(book: Book, flight: Flight, goal: Goal, avoid: Collection[WorkerId]) -> Placement | None:
    return book.router.place(
        book.fleet,
        flight.request.model,
        flight.num_tokens,
        goal=goal,
        prefer=flight.prefer,
        prefix_at=flight.prefix_at,
        avoid=avoid,
        cached=book.cached_tokens(flight),
        expected=book.expected(flight),
    )


def _offer(book: Book, flight: Flight, attempt: Attempt, now: float) -> Send:
    flight.record.move_to(Phase.ADMITTED, now=now)
    decode, prefill = book.fleet.up(attempt.decode), book.fleet.up(attempt.prefill)
    if decode is not None:
        decode.place_decode(attempt.id, flight.num_tokens, flight.request.tpot_target_s)
    reader = prefill or decode
    if reader is not None:
        reader.place_prefill(attempt.id, flight.num_tokens, flight.due)
    lease_s = book.settings.lease_s
    offer = StartDecode(spec=flight.spec(), prefill_worker=attempt.prefill, lease_s=lease_s)
    return Send(worker=attempt.decode, message=offer)


def reserved(book: Book, flight: Flight, attempt: Attempt, message: Reserved, now: float) -> list[Action]:
    decode = book.fleet.up(attempt.decode)
    if flight.record.phase is not Phase.ADMITTED or decode is None:
        return []
    decode.reserved(attempt.id)
    attempt.cached_tokens = message.cached_tokens
    flight.record.move_to(Phase.PREFILLING, now=now)
    reader = decode if attempt.prefill is None else book.fleet.up(attempt.prefill)
    if reader is not None:
        reader.latency.prompt_sent(attempt.id, flight.num_tokens, now)
    if attempt.prefill is None:
        decode.latency.prompt_cached(attempt.id, message.cached_tokens)
        decode.prefill_reached(attempt.id, max(flight.num_tokens - message.cached_tokens, 1))
        return []
    book.leased[flight.id] = now
    book.pushes.opened(attempt.id, attempt.prefill, attempt.decode, decode.info.epoch)
    start = StartPrefill(
        spec=flight.spec(),
        decode_worker=attempt.decode,
        decode_epoch=decode.info.epoch,
        dst_blocks=message.blocks,
        dst_cached_tokens=message.cached_tokens,
        transfer_deadline_s=book.settings.transfer_deadline_s,
    )
    return [Send(worker=attempt.prefill, message=start)]


def refused(book: Book, flight: Flight, attempt: Attempt, message: Refused, now: float) -> list[Action]:
    """Back to the queue, and the worker is not asked again before room may have appeared there."""
    decode = book.fleet.up(attempt.decode)
    if flight.record.phase is not Phase.ADMITTED or decode is None:
        return []
    error = refusal_of(message, flight.num_tokens, decode.info)
    if message.reason is RefusalReason.UNKNOWN_PEER:
        return endings.attempt_failed(
            book, flight, error, now, retryable=True, reporter=attempt.decode, blame=(attempt.prefill,)
        )
    flight.note(now, f"{attempt.decode} refused it: {message.reason.value} {message.detail}".rstrip())
    book.release(attempt)
    no_blocks = message.reason is RefusalReason.NO_BLOCKS
    if isinstance(error, InvalidRequest) or (no_blocks and _will_never_fit(book, flight, decode)):
        return endings.end(book, flight, Phase.REJECTED, error, now)
    if message.reason is RefusalReason.DRAINING:
        decode.draining = True
    else:
        decode.refused()
    flight.attempt = None
    flight.record.move_to(Phase.QUEUED, now=now)
    book.enqueue(flight)
    return []
