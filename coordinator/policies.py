"""How one worker is chosen among candidates with scores. A score is predicted load: lower is better."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

from pdserve.core.config import RoutingPolicy
from pdserve.core.ids import WorkerId

_SHOWN: Final = 8
"""Candidates that the text of a choice lists at most; the choice itself has all of them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    worker: WorkerId
    score: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision that explains itself: everyone who could have been taken, and why this one was."""

    worker: WorkerId
    candidates: tuple[Candidate, ...]
    reason: str

    def __str__(self) -> str:
        shown = self.candidates
        if len(shown) > _SHOWN:
            shown = tuple(heapq.nsmallest(_SHOWN, shown, key=lambda c: c.score))
        scores = ", ".join(f"{c.worker}={c.score:.4g}" for c in shown)
        if len(shown) < len(self.candidates):
            scores += f", and {len(self.candidates) - len(shown)} with higher scores"
        return f"{self.worker} ({self.reason}; {scores})"


class Policy(Protocol):
    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        """Pick one of `candidates`, which is not empty and sorted by worker id."""
        ...


class LeastLoaded:
    """The lowest score; the first by name among equals."""

    reason = "least loaded"

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        best = min(candidates, key=lambda c: (c.score, c.worker))
        return Choice(best.worker, tuple(candidates), self.reason)


class PowerOfTwo:
    """The better of two drawn at random: near the best balance, without herding on stale scores.

    M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        if len(candidates) == 1:
            return Choice(candidates[0].worker, tuple(candidates), "the only one")
        one, two = self._rng.sample(list(candidates), 2)
        best = min(one, two, key=lambda c: c.score)
        return Choice(best.worker, tuple(candidates), f"better of {one.worker} and {two.worker}")


class LeastViolation(LeastLoaded):
    """The lowest score, where a score puts predicted violations before load (see `coordinator.sla`)."""

    reason = "least predicted violation, then load"


class RoundRobin:
    """The next by name after the last one taken, also while workers come and go."""

    def __init__(self) -> None:
        self._last = WorkerId("")

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        after = [c.worker for c in candidates if c.worker > self._last]
        self._last = after[0] if after else candidates[0].worker
        return Choice(self._last, tuple(candidates), "next in turn")


class Random:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        return Choice(self._rng.choice(list(candidates)).worker, tuple(candidates), "drawn at random")


def make_policy(name: RoutingPolicy, seed: str) -> Policy:
    """A policy of its own; the same `seed` and the same calls give the same choices."""
    match name:
        case RoutingPolicy.POWER_OF_TWO:
            return PowerOfTwo(random.Random(seed))
        case RoutingPolicy.LEAST_LOADED:
            return LeastLoaded()
        case RoutingPolicy.SLA:
            return LeastViolation()
        case RoutingPolicy.ROUND_ROBIN:
            return RoundRobin()
        case RoutingPolicy.RANDOM:
            return Random(random.Random(seed))
        case _:
            assert_never(name)
