"""The beginning of a prompt is sent by a peer that has it, before the request goes to who lacks it. Pure.

    placed --ReceivePrefix--> R: Reserved --PushPrefix--> H: KvArrived from R --> the request is offered
                               '-- Refused, a failure, a loss, or too long ----------^  R reads what it lacks

R reads the prompt, H has the most of it cached. Asked only where moving is predicted to take less than half
of computing it: bytes over what was measured between these two, against what R takes to read the tokens. Each
is an attempt of its own (`ATTEMPT/prefix`), which may outlive the request: what arrives stays cached at R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator import endings
from coordinator.book import Book
from coordinator.events import Action, Send
from coordinator.fetch_tally import FetchOutcome
from coordinator.fleet import WorkerState
from coordinator.flight import Attempt, Flight
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    KvArrived,
    PushesSettled,
    PushPrefix,
    ReceivePrefix,
    Refused,
    Reserved,
    TransferDone,
    Up,
)

LEAST_BLOCKS: Final = 4
"""Fewer are computed."""
_TIMES: Final = 2.0
ASKING_S: Final = 0.01
"""Messages to and fro, before and after the bytes."""
_SHORTEST_S: Final = 0.25
"""Until it is given up; or for as long as reading would have taken, if that is more."""
KNOWN: Final = 5
"""Prompts that a worker must have read before its speed is known."""


@dataclass(slots=True, kw_only=True)
class Fetch:
    id: AttemptId
    attempt: AttemptId
    """That waits for it."""
    model: str
    offer: Send
    to: WorkerId
    source: WorkerId
    source_epoch: int
    tokens: list[int]
    cache_salt: bytes
    until: float


def offered(book: Book, flight: Flight, attempt: Attempt, offer: Send, now: float) -> list[Action]:
    """The offer of a request that was placed, or first what its prompt's reader lacks and another has."""
    reader = book.fleet.up(attempt.prefill or attempt.decode)
    if not book.settings.fetch_prefixes or reader is None:
        return [offer]
    if not book.prefixes.num_blocks:
        return [offer]
    here, cached = book.cached_tokens(flight).get(reader.id, 0), book.pool_tokens(flight)
    source = _source(book, reader, cached, here)
    if source is None:
        return [offer]
    tokens = cached[source.id]
    moving_s = _moving_s(book, source, reader, tokens - here)
    reading_s = time_to_read_s(reader, here, tokens)
    if reading_s is None or _TIMES * (moving_s or ASKING_S) >= reading_s:
        return [offer]
    if moving_s is None:
        # They measure what lies between them when they meet: the next prompt can tell.
        return [*_introduced(source, reader), offer]
    fetch = Fetch(
        # An attempt that is refused is offered again under its id: this one is never used twice.
        id=AttemptId(RequestId(f"{attempt.id}/prefix"), book.num_fetches),
        attempt=attempt.id,
        model=flight.request.model,
        offer=offer,
        to=reader.id,
        source=source.id,
        source_epoch=source.info.epoch,
        tokens=(flight.request.tokens + flight.output)[:tokens],
        cache_salt=flight.request.cache_salt,
        until=now + max(reading_s, _SHORTEST_S),
    )
    book.fetches[fetch.id] = fetch
    book.num_fetches += 1
    flight.note(
        now,
        f"{reader.id} is sent {tokens - here} tokens of its prompt that {source.id} has: "
        f"{moving_s * 1e3:.0f} ms, reading them would take {reading_s * 1e3:.0f} ms",
    )
    receive = ReceivePrefix(
        attempt=fetch.id,
        tokens=fetch.tokens,
        cache_salt=fetch.cache_salt,
        writer=source.id,
        lease_s=book.settings.lease_s,
    )
    return [*_introduced(source, reader), Send(worker=reader.id, message=receive)]


def heard(book: Book, fetch: Fetch, worker: WorkerId, message: Up, now: float) -> list[Action]:
    """What is not its sender's to say is ignored."""
    match message:
        case Reserved() if worker == fetch.to:
            return _push(book, fetch, message, now)
        case KvArrived() if worker == fetch.to:
            return _ended(book, fetch, FetchOutcome.ARRIVED, "arrived", now)
        case Refused() if worker == fetch.to:
            why = f"{worker} refused it: {message.detail}"
            return _ended(book, fetch, FetchOutcome.REFUSED, why, now)
        case AttemptFailed() if worker in (fetch.to, fetch.source):
            return _given_up(book, fetch, FetchOutcome.FAILED, message.message, now, reporter=worker)
        case _:
            return []


def worker_lost(book: Book, worker: WorkerId, now: float) -> list[Action]:
    actions: list[Action] = []
    for fetch in [f for f in book.fetches.values() if worker in (f.to, f.source)]:
        actions += _given_up(book, fetch, FetchOutcome.LOST, f"{worker} is down", now, reporter=worker)
    return actions


def expire(book: Book, now: float) -> list[Action]:
    actions: list[Action] = []
    for fetch in [f for f in book.fetches.values() if f.until <= now]:
        actions += _given_up(book, fetch, FetchOutcome.LATE, "it took too long", now, reporter=None)
    return actions


def moved(book: Book, worker: WorkerId, message: TransferDone) -> None:
    """The holder's last word on a push that went well; its fetch may have ended by then."""
    push = book.pushes.prefix_target(message.attempt, worker)
    if push is None or not message.bytes_moved:
        return
    model, target = push
    book.fetched.moved(model, message.path, message.bytes_moved, message.busy_s)
    book.fleet.links.moved(worker, target, message.bytes_moved, message.busy_s)


# --- whether ------------------------------------------------------------------------------------------


def _source(book: Book, reader: WorkerState, cached: dict[WorkerId, int], here: int) -> WorkerState | None:
    """Who has the most in its pool, and enough more than the reader has `here`."""
    least = here + LEAST_BLOCKS * reader.info.block_tokens
    for name in sorted(cached, key=lambda name: (-cached[name], name)):
        if cached[name] < least:
            return None
        worker = book.fleet.up(name)
        fits = worker is not None and worker.info.fingerprint == reader.info.fingerprint
        if worker is not None and fits and not book.fleet.pairs.avoids(name, reader.id):
            return worker
    return None


def _moving_s(book: Book, source: WorkerState, reader: WorkerState, tokens: int) -> float | None:
    """None: nothing was ever measured between the two."""
    links, size_bytes = book.fleet.links, tokens * source.kv_token_bytes
    rate = links.bytes_per_s(source.id, reader.id)
    if rate is None and source.heartbeat is not None:
        probes = {pair.peer: pair.bytes_per_s for pair in source.heartbeat.pairs if pair.bytes_per_s}
        rate = probes.get(reader.id) or min(probes.values(), default=None)
    if not rate:
        return None
    return (size_bytes + links.bytes_under_way(source.id)) / rate + ASKING_S


def time_to_read_s(reader: WorkerState, start: int, end: int) -> float | None:
    fit = reader.latency.prefill
    return fit.predict((0, end - start, (end * end - start * start) / 2)) if fit.count >= KNOWN else None


def _introduced(source: WorkerState, reader: WorkerState) -> list[Action]:
    """Workers of different roles have met when they joined."""
    known = (reader.id, reader.info.epoch) in source.met
    if source.info.role is not reader.info.role or known:
        return []
    source.met.add((reader.id, reader.info.epoch))
    reader.met.add((source.id, source.info.epoch))
    return endings.introductions(source.info, reader.info)


# --- how it goes on -----------------------------------------------------------------------------------


def _push(book: Book, fetch: Fetch, message: Reserved, now: float) -> list[Action]:
    reader = book.fleet.up(fetch.to)
    if message.cached_tokens >= len(fetch.tokens):
        return _ended(book, fetch, FetchOutcome.THERE, "it was there", now)
    if reader is None or book.fleet.up(fetch.source, fetch.source_epoch) is None:
        return _given_up(book, fetch, FetchOutcome.LOST, f"{fetch.source} is down", now, reporter=None)
    if book.pushes.is_open(fetch.id):
        return []
    book.pushes.opened(fetch.id, fetch.source, fetch.to, reader.info.epoch, prefix_of=fetch.model)
    size_bytes = (len(fetch.tokens) - message.cached_tokens) * reader.kv_token_bytes
    book.fleet.links.begun(fetch.source, fetch.id, size_bytes)
    push = PushPrefix(
        attempt=fetch.id,
        tokens=fetch.tokens,
        cache_salt=fetch.cache_salt,
        worker=fetch.to,
        worker_epoch=reader.info.epoch,
        dst_blocks=message.blocks,
        dst_cached_tokens=message.cached_tokens,
        transfer_deadline_s=book.settings.transfer_deadline_s,
    )
    return [Send(worker=fetch.source, message=push)]


def _given_up(
    book: Book, fetch: Fetch, outcome: FetchOutcome, why: str, now: float, *, reporter: WorkerId | None
) -> list[Action]:
    """The reader may not use its blocks before nothing can land there any more."""
    actions: list[Action] = []
    cancel = Cancel(attempt=fetch.id, reason=why)
    if book.fleet.up(fetch.to) is not None and fetch.to != reporter:
        actions.append(Send(worker=fetch.to, message=cancel))
    if book.pushes.is_open(fetch.id):
        book.pushes.ended_early(fetch.id)
        if book.fleet.up(fetch.source) is not None and fetch.source != reporter:
            actions.append(Send(worker=fetch.source, message=cancel))
    elif book.fleet.up(fetch.to) is not None:
        actions.append(Send(worker=fetch.to, message=PushesSettled(attempt=fetch.id)))
    return actions + _ended(book, fetch, outcome, why, now)


def _ended(book: Book, fetch: Fetch, outcome: FetchOutcome, how: str, now: float) -> list[Action]:
    """The request goes on, if it still waits."""
    del book.fetches[fetch.id]
    flight = book.flights.get(fetch.attempt.request)
    book.fetched.ended[fetch.model, outcome] += 1
    current = None if flight is None else flight.attempt
    if flight is None or current is None or current.id != fetch.attempt:
        return []
    flight.note(now, f"what {fetch.source} has of its prompt: {how}")
    if flight.record.phase is not Phase.ADMITTED or book.fleet.up(fetch.offer.worker) is None:
        return []
    return [fetch.offer]
