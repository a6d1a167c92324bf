"""What became of prefixes that were asked of other workers, since start. The metrics read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class FetchOutcome(StrEnum):
    ARRIVED = "arrived"
    THERE = "there"
    """The reader had it by then: nothing moved."""
    REFUSED = "refused"
    """By the reader, for want of room for instance."""
    FAILED = "failed"
    """The holder has it no more, or the push broke."""
    LOST = "lost"
    """A worker of the two died."""
    LATE = "late"
    """It took as long as reading would have."""


@dataclass(slots=True)
class FetchTally:
    """By model."""

    ended: Counter[tuple[str, FetchOutcome]] = field(default_factory=Counter)
    """Every fetch that was begun ends once."""
    bytes_moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By model and path; also of pushes whose request did not wait for them any longer."""
    busy_s: dict[tuple[str, str], float] = field(default_factory=dict)

    def count(self, outcome: FetchOutcome) -> int:
        """Of all models."""
        return sum(count for (_, how), count in self.ended.items() if how is outcome)

    def moved(self, model: str, path: str, size_bytes: int, busy_s: float) -> None:
        self.bytes_moved[model, path] += size_bytes
        self.busy_s[model, path] = self.busy_s.get((model, path), 0.0) + busy_s
