"""Refusing at once what cannot be served in time, instead of letting it queue, compute and be thrown away."""

from __future__ import annotations

from typing import Final

from coordinator.book import Book
from coordinator.events import NewRequest
from coordinator.sla import Goal, soonest_s
from pdserve.core.config import Admission, RoutingPolicy
from pdserve.core.errors import Overloaded

_DEADLINE_DEVIATIONS: Final = -2.0
_TARGET_DEVIATIONS: Final = 1.0
_LONGEST_WAIT_S: Final = 30.0


def hopeless(book: Book, request: NewRequest, now: float) -> Overloaded | None:
    """Why no placement can give the first token in time, and when it may be worth asking again.

    A deadline is fatal, so a request is refused only when even the hopeful end of the error bar is too late.
    A TTFT target is a promise: who is admitted shall be served in time, so there the other end counts.
    Nothing is refused while too little is known of a worker.
    """
    mode = book.settings.admission
    if mode is Admission.OFF or book.router.policy is not RoutingPolicy.SLA:
        return None
    limit_s, what, deviations = request.deadline - now, "deadline", _DEADLINE_DEVIATIONS
    due = request.deadline
    if request.ttft_target_s is not None:
        due = request.arrived + request.ttft_target_s
        if mode is Admission.TTFT and due - now < limit_s:
            limit_s, what, deviations = due - now, "TTFT target", _TARGET_DEVIATIONS
    readers = book.router.readers(book.fleet, request.model)
    soonest = soonest_s(readers, len(request.tokens), Goal(due=due), deviations=deviations)
    if soonest == 0:
        return None  # too little is known
    queue_s = book.queue_wait_s(request.model, request.priority)
    soonest += queue_s if deviations > 0 else queue_s / 2
    if soonest <= limit_s:
        return None
    retry_s = min(max(soonest - limit_s, 0.1), _LONGEST_WAIT_S)
    reason = f"request {request.id}: its first token would take {soonest:.2f} s"
    return Overloaded(f"{reason}, its {what} is in {limit_s:.2f} s", retry_after_s=retry_s)
