"""How an attempt is taken back from its workers, tried again, or ended with its request."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.account import close_leg, reason_of
from coordinator.book import Book
from coordinator.events import Action, End, Send
from coordinator.flight import Attempt, Flight
from pdserve.core.config import Admission
from pdserve.core.errors import ErrorCode, PdServeError, RequestCancelled
from pdserve.core.ids import WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Cancel, ConnectPeer, FinishReason, PushesSettled, WorkerInfo


def finish(
    book: Book, flight: Flight, reason: FinishReason, now: float, *, reporter: WorkerId | None
) -> list[Action]:
    """The answer is complete. `reporter` ended its own part already and needs no `Cancel`."""
    withdrawn = withdraw(book, flight, "finished", now, reporter=reporter)
    return withdrawn + end(book, flight, Phase.FINISHED, reason, now)


def stop(book: Book, flight: Flight, now: float) -> list[Action]:
    """A stop string was found in the text that was streamed so far."""
    withdrawn = withdraw(book, flight, "stop string", now)
    # Found while waiting for another attempt, there is nothing left to do for that one.
    phase = Phase.CANCELLED if flight.record.phase in (Phase.QUEUED, Phase.ADMITTED) else Phase.FINISHED
    return withdrawn + end(book, flight, phase, FinishReason.STOP, now)


def cancel(book: Book, flight: Flight, reason: str, now: float) -> list[Action]:
    error = RequestCancelled(f"request {flight.id}: {reason}")
    return withdraw(book, flight, reason, now) + end(book, flight, Phase.CANCELLED, error, now)


def fail(book: Book, flight: Flight, error: PdServeError, now: float) -> list[Action]:
    """End for good."""
    return withdraw(book, flight, str(error), now) + end(book, flight, Phase.FAILED, error, now)


def attempt_failed(
    book: Book,
    flight: Flight,
    error: PdServeError,
    now: float,
    *,
    retryable: bool,
    reporter: WorkerId | None,
    blame: Iterable[WorkerId | None],
) -> list[Action]:
    """A new attempt that starts with the tokens streamed so far, or the end of the request.

    `blame`: workers that the next attempt stays away from if it can.
    """
    if flight.ending is not None:
        return finish(book, flight, flight.ending, now, reporter=reporter)
    attempt = flight.attempt
    actions = withdraw(book, flight, str(error), now, reporter=reporter, failure=reason_of(error))
    if attempt is not None and error.code is ErrorCode.UNAVAILABLE:
        actions += _introduce_again(book, attempt)
    if attempt is not None and error.code in (ErrorCode.UNAVAILABLE, ErrorCode.DATA_LOSS):
        _doubt_pair(book, flight, attempt, now)
    if not retryable or flight.attempts >= book.settings.max_attempts:
        return actions + end(book, flight, Phase.FAILED, error, now)
    flight.note(now, f"attempt {flight.record.attempt} failed: {error}")
    flight.failed_on.update(worker for worker in blame if worker is not None)
    flight.retries += 1
    _requeue(book, flight, now)
    return actions


def start_over(
    book: Book, flight: Flight, why: str, now: float, *, reporter: WorkerId | None = None
) -> list[Action]:
    """Nothing failed: the request shall go on elsewhere, where its tokens so far are read again."""
    flight.note(now, why)
    actions = withdraw(book, flight, why, now, reporter=reporter)
    _requeue(book, flight, now)
    return actions


def _requeue(book: Book, flight: Flight, now: float) -> None:
    release_followers(book, flight)
    attempt = flight.attempt
    if attempt is not None and (attempt.prefill_done is not None):
        reader = attempt.prefill or attempt.read_by
        flight.prefix_at = None if reader in flight.failed_on else reader
    flight.attempt = None
    flight.record.attempt += 1
    flight.record.move_to(Phase.QUEUED, now=now)
    book.enqueue(flight)


def _doubt_pair(book: Book, flight: Flight, attempt: Attempt, now: float) -> None:
    """Its KV did not arrive, though both workers live: what is between them may be at fault."""
    prefill, decode = book.fleet.up(attempt.prefill), book.fleet.up(attempt.decode)
    if prefill is None or decode is None or attempt.kv_arrived:
        return
    seconds = book.fleet.pairs.failed(prefill.id, decode.id, now)
    if seconds:
        flight.note(now, f"no KV gets from {prefill.id} to {decode.id}: avoided for {seconds:.0f} s")


def _introduce_again(book: Book, attempt: Attempt) -> list[Action]:
    """A worker forgets a peer that its transport gave up; if both still live, they shall meet again."""
    prefill, decode = book.fleet.up(attempt.prefill), book.fleet.up(attempt.decode)
    if prefill is None or decode is None:
        return []
    return introductions(prefill.info, decode.info)


def introductions(one: WorkerInfo, other: WorkerInfo) -> list[Action]:
    """Each is told of the other; who knows the other's process already takes no notice."""
    return [
        Send(
            worker=to.worker,
            message=ConnectPeer(
                peer=of.worker, epoch=of.epoch, fingerprint=of.fingerprint, metadata=of.transfer_metadata
            ),
        )
        for to, of in ((one, other), (other, one))
    ]


def withdraw(
    book: Book,
    flight: Flight,
    why: str,
    now: float,
    *,
    reporter: WorkerId | None = None,
    failure: str = "",
) -> list[Action]:
    """Take the current attempt, and its move, back from its workers, where anything of it may be left."""
    attempt = flight.attempt
    if attempt is None:
        return []
    actions = abandon_move(book, flight, why, now, reporter=None)
    close_leg(book.fleet, flight, attempt, now, failure=failure)
    book.release(attempt)
    book.leased.pop(flight.id, None)
    if flight.ending is not None:
        return actions  # both workers did all of their work
    message = Cancel(attempt=attempt.id, reason=why)
    decode = book.fleet.up(attempt.decode)
    if decode is not None and attempt.decode != reporter:
        actions.append(Send(worker=attempt.decode, message=message))
    if attempt.prefill is not None:
        actions += _withdraw_pushes(book, attempt, message, reporter, decode_is_up=decode is not None)
    return actions


def abandon_move(
    book: Book, flight: Flight, why: str, now: float, *, reporter: WorkerId | None
) -> list[Action]:
    """A move to another decode worker comes to nothing: the request goes on where it is."""
    moving, flight.moving = flight.moving, None
    if moving is None:
        return []
    flight.record.move_to(Phase.DECODING, now=now)
    book.release(moving)
    book.leased.pop(flight.id, None)
    source, target = book.fleet.up(moving.prefill), book.fleet.up(moving.decode)
    message = Cancel(attempt=moving.id, reason=why)
    actions: list[Action] = []
    if target is not None and moving.decode != reporter:
        actions.append(Send(worker=target.id, message=message))
    paused = moving.prefill_sent and not book.pushes.is_open(moving.id)
    actions += _withdraw_pushes(book, moving, message, reporter, decode_is_up=target is not None)
    if source is not None:
        source.met.discard((moving.decode, 0 if target is None else target.info.epoch))
        if paused:
            actions.append(Send(worker=source.id, message=message))
    return actions


def _withdraw_pushes(
    book: Book, attempt: Attempt, message: Cancel, reporter: WorkerId | None, *, decode_is_up: bool
) -> list[Action]:
    prefill = attempt.prefill
    if prefill is not None and book.pushes.is_open(attempt.id):
        book.pushes.ended_early(attempt.id)
        if book.fleet.up(prefill) is not None and prefill != reporter:
            return [Send(worker=prefill, message=message)]
    elif decode_is_up and not attempt.kv_arrived:
        # Never sent to a prefill worker, or all of its pushes are terminal: nothing can land any more.
        return [Send(worker=attempt.decode, message=PushesSettled(attempt=attempt.id))]
    return []


def end(
    book: Book, flight: Flight, phase: Phase, outcome: FinishReason | PdServeError, now: float
) -> list[Action]:
    """Forget the request; the one place where that happens."""
    report = flight.report(now, phase)
    flight.record.move_to(phase, now=now)
    release_followers(book, flight)
    del book.flights[flight.id]
    book.ending.pop(flight.id, None)
    book.leased.pop(flight.id, None)
    if flight.request.model in book.waiting:
        book.waiting[flight.request.model].discard(flight.id)
    if flight.leader is not None:
        book.followers[flight.leader].remove(flight.id)
    if phase is not Phase.REJECTED:  # which had no place to leave
        book.count_end(now)
    if phase is Phase.FINISHED and book.settings.admission is not Admission.OFF:
        book.margins_of(report.model).kept(report)
    book.settle(flight, now)
    if flight.story is not None:
        flight.story.report, flight.story.outcome = report, outcome
    return [End(request=flight.id, outcome=outcome, report=report)]


def release_followers(book: Book, flight: Flight) -> None:
    """The first sample's KV is where the others can share it, or never will be: let them go."""
    for request in book.followers.pop(flight.id, ()):
        follower = book.flights[request]
        follower.leader = None
        follower.prefer = None if flight.attempt is None else flight.attempt.placement
        book.enqueue(follower)
