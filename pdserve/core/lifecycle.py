"""The life of a request: phases, and the only transitions between them.

`docs/lifecycle.md` is generated from `NEXT`; `RequestRecord.move_to` is the only way to change a phase.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pdserve.core.errors import IllegalTransition
from pdserve.core.ids import AttemptId, RequestId


class Phase(StrEnum):
    QUEUED = "queued"
    ADMITTED = "admitted"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    MIGRATING = "migrating"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"


_ENDS: Final = frozenset({Phase.FAILED, Phase.CANCELLED})
_RETRY_OR_END: Final = _ENDS | {Phase.QUEUED}

NEXT: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.QUEUED: frozenset({Phase.ADMITTED, Phase.REJECTED}) | _ENDS,
    Phase.ADMITTED: frozenset({Phase.PREFILLING, Phase.REJECTED}) | _RETRY_OR_END,
    # A prompt whose first token ends the answer is finished by the prefill worker itself.
    Phase.PREFILLING: frozenset({Phase.TRANSFERRING, Phase.DECODING, Phase.FINISHED}) | _RETRY_OR_END,
    Phase.TRANSFERRING: frozenset({Phase.DECODING, Phase.FINISHED}) | _RETRY_OR_END,
    Phase.DECODING: frozenset({Phase.FINISHED, Phase.MIGRATING}) | _RETRY_OR_END,
    Phase.MIGRATING: frozenset({Phase.DECODING}) | _RETRY_OR_END,
    Phase.FINISHED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELLED: frozenset(),
    Phase.REJECTED: frozenset(),
}

TERMINAL: Final[frozenset[Phase]] = frozenset(phase for phase, after in NEXT.items() if not after)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """A request's phase and how it got there. `now` is always the caller's clock, in seconds."""

    id: RequestId
    created: float
    attempt: int = 0
    phase: Phase = Phase.QUEUED
    history: list[tuple[float, Phase]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history.append((self.created, self.phase))

    @property
    def attempt_id(self) -> AttemptId:
        return AttemptId(self.id, self.attempt)

    @property
    def done(self) -> bool:
        return self.phase in TERMINAL

    def move_to(self, phase: Phase, *, now: float) -> None:
        """Change the phase, or raise `IllegalTransition`."""
        if phase not in NEXT[self.phase]:
            raise IllegalTransition(self.id, self.phase, phase, self.history)
        self.phase = phase
        self.history.append((now, phase))

    def seconds_in(self, phase: Phase, *, now: float) -> float:
        """Total time spent in `phase` so far, over all attempts."""
        total = 0.0
        for (start, at), end in zip(self.history, [t for t, _ in self.history[1:]] + [now], strict=True):
            if at is phase:
                total += end - start
        return total
