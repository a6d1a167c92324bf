"""What a planner says: what to change, what it would bring, how sure that is, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role


@dataclass(frozen=True, slots=True)
class Split:
    """Workers of each role."""

    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A worker takes up the other role."""

    worker: WorkerId
    to: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Workers of a role are added, or removed where `by` is negative."""

    role: Role
    by: int


Change = Flip | Scale


class Standing(StrEnum):
    """What has become of a proposal."""

    KEEP = "keep"
    """Nothing is worth changing."""
    PROPOSED = "proposed"
    """Worth it; it is for the operator to do, or waits until it has held for long enough."""
    ACTED = "acted"
    """It is being done."""
    INFEASIBLE = "infeasible"
    """Not even the best fleet within the budget meets the targets."""
    UNKNOWN = "unknown"
    """Too little has been seen to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    model: str
    standing: Standing
    now: Split
    wanted: Split
    change: Change | None
    """The first step from `now` to `wanted`; None: there is none to make."""
    gain: float
    """Predicted, in parts of the requests that would be served in time."""
    uncertainty: float
    """Standard deviation of `gain`."""
    rate: float
    """Requests per second that are predicted."""
    capacity: float
    """Requests per second that the fleet as it is serves in time."""
    wanted_capacity: float
    reason: str

    def __str__(self) -> str:
        change = change_in_words(self.change)
        return f"{self.model}: {self.standing.value}{': ' if change else ''}{change} ({self.reason})"


def change_in_words(change: Change | None) -> str:
    """Empty for None."""
    match change:
        case Flip(worker=worker, to=role):
            return f"{worker} becomes {role.value}"
        case Scale(role=role, by=by):
            return f"{by:+d} {role.value}"
        case None:
            return ""
        case _:
            assert_never(change)
