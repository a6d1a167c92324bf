"""What a placement would come to against a request's targets: scores for routing, and when to refuse at once.

    TTFT of a prompt at P   P reads what is ahead of it and then it; prompts are read in the order of
                            their deadlines, so only those that are due no later are ahead
    TPOT at D               a step of D's batch with this request in it

A score is `violation x 1000 + load`: violation is by how much of its target a prediction is late, 0 in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.fleet import WorkerState
from coordinator.latency import Work

VIOLATION_WEIGHT: Final = 1e3
_MOST: Final = 1e3
"""Of violation: later than this is as bad."""
_EVIDENCE: Final = 10
"""Steps that a worker must have been heard of before anything is refused on its account."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request still wants, from now on. None: it did not say."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    due: float = math.inf
    """When its first token is due, on the registry's clock."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted when the request was placed, from then on."""

    ttft_s: float
    tpot_s: float


def forecast(decode: WorkerState, prefill: WorkerState | None, tokens: int, goal: Goal) -> Forecast:
    reader = decode if prefill is None else prefill
    step_s = decode.latency.step_s(*decode.batch_with(tokens))
    return Forecast(reader.latency.prefill_s(_ahead(reader, tokens, goal)), step_s)


def prefill_score(worker: WorkerState, tokens: int, goal: Goal) -> float:
    wait_s = worker.latency.prefill_s(_ahead(worker, tokens, goal))
    return VIOLATION_WEIGHT * _late(wait_s, goal.ttft_s) + wait_s


def decode_score(worker: WorkerState, tokens: int, goal: Goal, *, reads: bool) -> float:
    """reads: it also reads the prompt, so that how soon counts as well."""
    step_s = worker.latency.step_s(*worker.batch_with(tokens))
    score = VIOLATION_WEIGHT * _late(step_s, goal.tpot_s) + worker.decode_load(tokens)
    return score + prefill_score(worker, tokens, goal) if reads else score


def soonest_s(readers: Sequence[WorkerState], tokens: int, goal: Goal, *, deviations: float) -> float:
    """When the first of them will have read the prompt, each prediction taken this many of its standard
    deviations above its mean. 0 while too little is known of one of them.
    """
    soonest = math.inf
    for worker in readers:
        if worker.latency.prefill.count < _EVIDENCE:
            return 0.0
        features = _ahead(worker, tokens, goal).features
        fit = worker.latency.prefill
        soonest = min(soonest, fit.predict(features) + deviations * fit.std(features))
    return max(soonest, 0.0) if readers else 0.0


def _ahead(worker: WorkerState, tokens: int, goal: Goal) -> Work:
    return worker.work_due(goal.due) + Work.of(0, tokens, ends=True)


def _late(predicted_s: float, target_s: float | None) -> float:
    if target_s is None or predicted_s <= target_s:
        return 0.0
    return _MOST if target_s <= 0 else min(predicted_s / target_s - 1, _MOST)
