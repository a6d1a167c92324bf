"""What happened to each of the last requests, for `pdserve explain`: kept in a ring, cheap per token."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from coordinator.account import Leg
from coordinator.sla import Goal, prefill_score
from pdserve.core.errors import PdServeError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import FinishReason

if TYPE_CHECKING:
    from coordinator.decisions import Choice, Placement
    from coordinator.events import NewRequest
    from coordinator.fleet import Fleet
    from coordinator.report import Report

_NOTES: Final = 64
_OUTPUTS: Final = 2048
_ELSEWHERE: Final = 8
"""Candidates of each role, the best ones, for which it is kept what they were predicted to come to."""


class Note(NamedTuple):
    at: float
    text: str


class Elsewhere(NamedTuple):
    """What a request was predicted to come to at a candidate, from the decision on. None: not that role's."""

    ttft_s: float | None
    tpot_s: float | None


@dataclass(slots=True, kw_only=True)
class Story:
    """Times on the registry's clock, in seconds."""

    request: NewRequest
    """Without its tokens, which may be many."""
    prompt_tokens: int
    history: list[tuple[float, Phase]]
    """The record's own: it grows while the request lives."""
    notes: list[Note] = field(default_factory=list)
    output_at: array[float] = field(default_factory=lambda: array("d"))
    output_tokens: array[int] = field(default_factory=lambda: array("I"))
    outputs_left_out: int = 0
    elsewhere: list[dict[WorkerId, Elsewhere]] = field(default_factory=list)
    """For each decision."""
    legs: list[Leg] = field(default_factory=list)
    """The flight's own: of attempts that have ended."""
    report: Report | None = None
    outcome: FinishReason | PdServeError | None = None

    def note(self, at: float, text: str) -> None:
        """The last ones are kept."""
        self.notes.append(Note(at, text))
        if len(self.notes) > _NOTES:
            del self.notes[1]  # the first says how it came

    def output(self, at: float, tokens: int) -> None:
        if len(self.output_at) < _OUTPUTS:
            self.output_at.append(at)
            self.output_tokens.append(tokens)
        else:
            self.outputs_left_out += 1

    def placed(self, fleet: Fleet, placement: Placement, tokens: int, goal: Goal) -> None:
        """Keep what the other candidates promised, which nobody can say later."""
        found: dict[WorkerId, Elsewhere] = {}
        for candidate in _best(placement.decode):
            worker = fleet.get(candidate)
            if worker is not None:
                step_s = worker.latency.step_s(*worker.batch_with(tokens))
                found[candidate] = Elsewhere(None, step_s)
        for candidate in () if placement.prefill is None else _best(placement.prefill):
            worker = fleet.get(candidate)
            if worker is not None:
                found[candidate] = Elsewhere(prefill_score(worker, tokens, goal)[1], None)
        self.elsewhere.append(found)
        del self.elsewhere[:-8]  # as many as there are decisions


def _best(choice: Choice) -> list[WorkerId]:
    ranked = sorted(choice.candidates, key=lambda c: (c.worker != choice.worker, c.score))
    return [candidate.worker for candidate in ranked[:_ELSEWHERE]]


class Stories:
    """Of the last `limit` requests, in order of arrival."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._of: OrderedDict[RequestId, Story] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def begin(self, story: Story) -> Story | None:
        """None where nothing is kept."""
        if self._limit == 0:
            return None
        self._of.pop(story.request.id, None)
        self._of[story.request.id] = story
        if len(self._of) > self._limit:
            self._of.popitem(last=False)
        return story

    def get(self, request: RequestId) -> Story | None:
        return self._of.get(request)

    def last(self) -> Story | None:
        return next(reversed(self._of.values()), None)
