"""What was decided about a placement and why, as plain data: for `explain`, for replays and for tests.

A decision has two choices, a decode worker and who reads the prompt, and the routes that were compared: the
prompt read by a prefill worker and its KV moved, or read by the decode worker itself.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from pdserve.core.ids import RequestId, WorkerId

_SHOWN: Final = 8
"""Candidates that the text of a choice lists at most; the choice itself has all of them."""


class Candidate(NamedTuple):
    """A worker that could have been taken. Lower scores are better; a policy may go by the parts instead."""

    worker: WorkerId
    score: float
    violation: float = 0.0
    """By how much the request's targets would be missed, relative to them; 0: they are met."""
    load: float = 0.0
    """Of a decode worker: share of its batch plus share of its blocks in use, this request included. Of a
    prefill worker: seconds until it has read this prompt."""
    prefix_tokens: int = 0
    """Of the prompt, likely in its prefix cache."""
    transfer_s: float = 0.0
    """For the KV to the decode worker that was chosen, at the speed of this pair."""


class Rejected(NamedTuple):
    """A worker that was looked at and could not be taken."""

    worker: WorkerId
    why: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision that explains itself: who was looked at, and why this one was taken."""

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


class Route(NamedTuple):
    """One way to serve a request, and what it is predicted to come to. Seconds, from the decision on."""

    prefill: WorkerId | None
    """None: the decode worker reads the prompt itself."""
    decode: WorkerId
    ttft_s: float
    ttft_std_s: float
    """Standard deviation of an observation about the prediction."""
    tpot_s: float
    """Mean per token after the first; KV that is still under way after the first token is part of it."""
    tpot_std_s: float
    exposed_s: float
    """KV still under way after the prompt has been read, transfers ahead of it included."""
    alone_s: float
    """What this prompt takes to read, with nothing ahead of it."""
    others_s: float
    """What all other requests together lose by it."""
    violation: float
    """By how much this request's targets, and those of answers that run at the decode worker, are missed,
    relative to them."""
    cost: float
    """`VIOLATION_WEIGHT * violation + ttft_s + exposed_s + others_s`: the cheapest route is taken."""


@dataclass(frozen=True, slots=True)
class Placement:
    decode: Choice
    prefill: Choice | None
    """None: the decode worker reads the prompt itself."""
    routes: tuple[Route, ...] = ()
    """The one that was taken first, then those that were compared with it. Empty where nothing is predicted,
    as for a move."""
    rejected: tuple[Rejected, ...] = ()
    why: str = ""
    """Of the route."""

    @property
    def route(self) -> Route | None:
        """The one that was taken."""
        return self.routes[0] if self.routes else None

    def __str__(self) -> str:
        prefill = "by the decode worker" if self.prefill is None else str(self.prefill)
        if self.prefill is None and self.why:
            prefill += f" ({self.why})"
        return f"decode {self.decode}; prefill {prefill}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One placement of one attempt at a request."""

    request: RequestId
    attempt: int
    at: float
    """On the registry's clock, seconds."""
    model: str
    tokens: int
    """Prompt, and what earlier attempts had written."""
    policy: str
    ttft_target_s: float | None
    """Left of it at that moment."""
    tpot_target_s: float | None
    placement: Placement


class DecisionLog:
    """The decisions about the last requests, bounded: the oldest request is forgotten with all of its own."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._of: OrderedDict[RequestId, list[Decision]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Decision]:
        for decisions in self._of.values():
            yield from decisions

    def add(self, decision: Decision) -> None:
        """A request keeps its last eight decisions: one without room may be placed over and over."""
        kept = self._of.setdefault(decision.request, [])
        kept.append(decision)
        del kept[:-8]
        self._of.move_to_end(decision.request)
        if len(self._of) > self._limit:
            self._of.popitem(last=False)

    def of(self, request: RequestId) -> tuple[Decision, ...]:
        """Oldest first; empty for a request that is not known any more."""
        return tuple(self._of.get(request, ()))
