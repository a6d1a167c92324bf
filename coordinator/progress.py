"""What workers report about a running attempt, up to its last token."""

from __future__ import annotations

from coordinator import endings
from coordinator.book import Book
from coordinator.events import Action, Emit, EmitPrompt, Send
from coordinator.flight import Attempt, Flight
from pdserve.core.errors import InvariantViolated
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import (
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    RenewLease,
    Tokens,
    TransferDone,
)
from pdserve.core.sampling import TokenLogprobs


def prefill_started(
    book: Book, flight: Flight, attempt: Attempt, message: PrefillStarted, now: float
) -> list[Action]:
    attempt.prefill_queue_s = message.queue_s
    attempt.marks.prefill_began = now
    attempt.marks.read_from = attempt.marks.read_to = message.cached_tokens
    reader = book.fleet.get(attempt.prefill or attempt.decode)
    if reader is not None:
        reader.latency.prompt_cached(attempt.id, message.cached_tokens)
    return renew_lease(book, flight, attempt, now)


def transferred(book: Book, attempt: Attempt, message: TransferDone) -> None:
    attempt.transfer = message
    prefill = book.fleet.get(attempt.prefill)
    if attempt.prefill is not None:
        book.fleet.pairs.worked(attempt.prefill, attempt.decode)
    if prefill is not None and message.bytes_moved:
        prefill.latency.transferred(message)
        book.fleet.links.moved(prefill.id, attempt.decode, message.bytes_moved, message.busy_s)


def prefill_progress(
    book: Book, flight: Flight, attempt: Attempt, message: PrefillProgress, now: float
) -> list[Action]:
    attempt.marks.read(message.tokens_done, now)
    reader = book.fleet.get(attempt.prefill or attempt.decode)
    if reader is not None:
        reader.prefill_reached(attempt.id, max(flight.num_tokens - message.tokens_done, 0))
        reader.latency.prompt_reached(attempt.id, message.tokens_done, now)
    return renew_lease(book, flight, attempt, now)


def renew_lease(book: Book, flight: Flight, attempt: Attempt, now: float) -> list[Action]:
    """The prefill side lives, so the decode side keeps its blocks."""
    if flight.id not in book.leased or book.fleet.up(attempt.decode) is None:
        return []
    book.leased[flight.id] = now
    renewal = RenewLease(attempt=attempt.id, lease_s=book.settings.lease_s)
    return [Send(worker=attempt.decode, message=renewal)]


def renew_leases(book: Book, now: float) -> list[Action]:
    """For requests that wait their turn at a prefill worker that is up."""
    actions: list[Action] = []
    due = now - book.settings.lease_s / 3
    for request in [request for request, at in book.leased.items() if at <= due]:
        flight = book.flights[request]
        attempt = flight.moving or flight.attempt
        # Once its last push has ended, it is for the decode worker to say that it arrived, or to give it up.
        if attempt is None or not book.pushes.is_open(attempt.id):
            continue
        if book.fleet.up(attempt.prefill) is not None:
            actions += renew_lease(book, flight, attempt, now)
    return actions


def prefill_done(
    book: Book, flight: Flight, attempt: Attempt, message: PrefillDone, now: float
) -> list[Action]:
    """The first token is streamed at once, while its KV is still on the way."""
    if attempt.prefill_done is not None:
        return []
    attempt.prefill_done = message
    attempt.marks.prefill_ended = now
    attempt.marks.read(len(flight.request.tokens) + attempt.base, now)
    reader = book.fleet.get(attempt.prefill or attempt.decode)
    if reader is not None:
        reader.prefill_reached(attempt.id, 0)
        reader.latency.prompt_read(attempt.id, now)
        if attempt.prefill is None:
            reader.decodes(attempt.id)
        elif book.pushes.is_open(attempt.id):
            size_bytes = (flight.num_tokens - attempt.cached_tokens) * reader.kv_token_bytes
            book.fleet.links.begun(reader.id, attempt.id, size_bytes)
    actions: list[Action] = []
    if flight.request.sampling.prompt_logprobs is not None and not flight.prompt_logprobs_sent:
        flight.prompt_logprobs_sent = True
        actions.append(EmitPrompt(request=flight.id, logprobs=message.prompt_logprobs))
    if flight.ending is not None:
        return actions  # the decode worker was heard first, to its end
    logprobs = [] if message.logprobs is None else [message.logprobs]
    actions += _output(flight, attempt.base, [message.token], logprobs, now)
    if message.finish_reason is not None:
        reporter = attempt.prefill or attempt.decode
        return actions + endings.finish(book, flight, message.finish_reason, now, reporter=reporter)
    if flight.record.phase is Phase.PREFILLING:
        flight.record.move_to(Phase.DECODING if attempt.prefill is None else Phase.TRANSFERRING, now=now)
    return actions


def kv_arrived(book: Book, flight: Flight, attempt: Attempt, now: float) -> None:
    attempt.kv_arrived = True
    decode = book.fleet.get(attempt.decode)
    if decode is not None:
        decode.decodes(attempt.id)
    attempt.marks.arrived = now
    book.leased.pop(flight.id, None)
    if flight.record.phase in (Phase.PREFILLING, Phase.TRANSFERRING):
        flight.record.move_to(Phase.DECODING, now=now)
    endings.release_followers(book, flight)


def tokens(book: Book, flight: Flight, attempt: Attempt, message: Tokens, now: float) -> list[Action]:
    if flight.ending is not None or flight.record.phase is Phase.ADMITTED:
        return []
    if message.first_index > len(flight.output):
        missing = f"tokens {len(flight.output)} to {message.first_index - 1} never came"
        error = InvariantViolated(f"attempt {attempt.id}: {missing}")
        return endings.attempt_failed(
            book, flight, error, now, retryable=True, reporter=None, blame=(attempt.decode,)
        )
    if not attempt.kv_arrived:
        kv_arrived(book, flight, attempt, now)
    actions = _output(flight, message.first_index, message.tokens, message.logprobs, now)
    if message.finish_reason is None:
        return actions
    if book.pushes.is_open(attempt.id) and book.fleet.up(attempt.prefill) is not None:
        # The prefill worker's last word is on its way; it has the figures of the transfer.
        actions += endings.abandon_move(book, flight, "finished", now, reporter=None)
        flight.ending = message.finish_reason
        book.ending[flight.id] = now + book.settings.settle_wait_s
        book.release(attempt)
        return actions
    return actions + endings.finish(book, flight, message.finish_reason, now, reporter=attempt.decode)


def _output(
    flight: Flight, first_index: int, new: list[int], logprobs: list[TokenLogprobs], now: float
) -> list[Action]:
    """Emit what was not emitted yet: two workers know the first token, and an earlier attempt more."""
    known = len(flight.output) - first_index
    if known >= len(new):
        return []
    if known > 0:
        new, logprobs = new[known:], logprobs[known:]
    gap_s = None if flight.last_token_at is None else now - flight.last_token_at
    flight.add_output(new, now)
    return [Emit(request=flight.id, tokens=new, logprobs=logprobs, gap_s=gap_s)]


def settled(
    book: Book, attempt: AttemptId, worker: WorkerId, flight: Flight | None, now: float
) -> list[Action]:
    """The prefill worker's last word on an attempt, which may be that of a request long ended."""
    book.fleet.links.ended(worker, attempt)
    actions = book.pushes.settled(attempt, worker, book.epoch_of)
    current = None if flight is None else flight.attempt
    if flight is not None and flight.ending is not None and current is not None and current.id == attempt:
        actions += endings.finish(book, flight, flight.ending, now, reporter=None)
    return actions
