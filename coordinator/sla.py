"""What a placement would come to against a request's targets: scores for routing, and when to refuse at once.

    TTFT of a prompt at P   P reads what is ahead of it and then it; prompts are read in the order of
                            their deadlines, so only those that are due no later are ahead
    TTFT of a prompt at D   the same, and a step of D's answers goes with each chunk
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
from coordinator.linear_fit import LinearFit
from pdserve.core.messages import Role

VIOLATION_WEIGHT: Final = 1e3
CHUNK_TOKENS: Final = 512
"""Of a prompt that a decode worker reads in one step; the default of `decode.max_num_batched_tokens`."""
EVIDENCE: Final = 10
"""Steps that a worker must have been heard of before anything is refused on its account."""
_MOST: Final = 1e3
"""Of violation: later than this is as bad."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request still wants, from now on. None: it did not say."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    due: float = math.inf
    """When its first token is due, on the registry's clock."""
    answer_tokens: int = 128
    """The most that it may still write."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted when the request was placed, from then on."""

    ttft_s: float
    tpot_s: float
    ttft_std_s: float = 0.0
    tpot_std_s: float = 0.0
    """Standard deviations of an observation about the prediction."""


def prefill_score(worker: WorkerState, tokens: int, goal: Goal, cached: int = 0) -> tuple[float, float]:
    """Violation, and load: seconds until it has read the prompt, `cached` tokens of which it has."""
    wait_s = read_s(worker, worker.latency.prefill, tokens, goal, cached)
    return late(wait_s, goal.ttft_s), wait_s


def decode_score(
    worker: WorkerState, tokens: int, goal: Goal, *, reads: bool, cached: int = 0
) -> tuple[float, float]:
    """Violation and load. reads: it also reads the prompt, so that how soon counts as well."""
    violation, load = 0.0, worker.decode_load(tokens)
    if goal.tpot_s is not None:
        violation = late(step_s(worker, tokens, reads=reads), goal.tpot_s)
    if reads:
        more = prefill_score(worker, tokens, goal, cached)
        violation, load = violation + more[0], load + more[1]
    return violation, load


def step_s(worker: WorkerState, tokens: int, *, reads: bool = False) -> float:
    """A step of its batch with one more answer in it, whose context is `tokens`. reads: prompts come to it
    all the time, as there is nobody else to read them, so that its steps stay as long as they were of late.
    """
    alone_s = worker.latency.step_s(*worker.batch_with(tokens))
    return alone_s + worker.latency.reading_adds_s if reads else alone_s


def read_s(worker: WorkerState, fit: LinearFit, tokens: int, goal: Goal, cached: int = 0) -> float:
    """Until it has read what is due no later and then this prompt. fit: how long it takes to read."""
    ahead, start = worker.work_due(goal.due), min(cached, tokens - 1)
    to_read = ahead.tokens + tokens - start
    pairs = ahead.pairs + (tokens * tokens - start * start) / 2
    return fit.predict((ahead.prompts + 1, to_read, pairs)) + steps_between_s(worker, to_read)


def steps_between_s(worker: WorkerState, tokens: int) -> float:
    """What the answers that a decode worker writes take of the time in which it reads `tokens`."""
    if worker.info.role is not Role.DECODE or not worker.num_decoding:
        return 0.0
    # One is under way, half of it done.
    return (0.5 + math.ceil(tokens / CHUNK_TOKENS)) * worker.latency.step_s(*worker.decoding)


def work_until(worker: WorkerState, tokens: int, goal: Goal, cached: int = 0) -> Work:
    """What it has to read until it has read this prompt."""
    return worker.work_due(goal.due) + Work.of(min(cached, tokens - 1), tokens, ends=True)


def soonest_s(readers: Sequence[WorkerState], tokens: int, goal: Goal, *, deviations: float) -> float:
    """When the first of them will have read the prompt, each prediction taken this many of its standard
    deviations above its mean. 0 while too little is known of one of them.
    """
    soonest = math.inf
    for worker in readers:
        fit = worker.latency.prefill
        if fit.count < EVIDENCE:
            return 0.0
        work = work_until(worker, tokens, goal)
        wait_s = fit.predict(work.features) + deviations * fit.std(work.features)
        soonest = min(soonest, wait_s + steps_between_s(worker, work.tokens))
    return max(soonest, 0.0) if readers else 0.0


def late(predicted_s: float, target_s: float | None) -> float:
    """By how much of its target a prediction is late."""
    if target_s is None or predicted_s <= target_s:
        return 0.0
    return _MOST if target_s <= 0 else min(predicted_s / target_s - 1, _MOST)
