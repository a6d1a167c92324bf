"""What a placement would come to against a request's targets: scores for routing, and when to refuse at once.

    TTFT of a prompt at P   P reads what is ahead of it and then it; prompts are read in the order of
                            their deadlines, so only those that are due no later are ahead
    TTFT of a prompt at D   the same in D's chunks, each in one step with D's answers
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
    wait_s = reading_s(worker, work_until(worker, tokens, goal, cached))
    return late(wait_s, goal.ttft_s), wait_s


def decode_score(
    worker: WorkerState, tokens: int, goal: Goal, *, reads: bool, cached: int = 0
) -> tuple[float, float]:
    """Violation and load. reads: it also reads the prompt, so that how soon counts as well."""
    violation, load = 0.0, worker.decode_load(tokens)
    if goal.tpot_s is not None:
        violation = late(step_s(worker, tokens), goal.tpot_s)
    if reads:
        more = prefill_score(worker, tokens, goal, cached)
        violation, load = violation + more[0], load + more[1]
    return violation, load


def step_s(worker: WorkerState, tokens: int) -> float:
    """A step of its batch with one more answer in it, whose context is `tokens`, and with what the prompts
    that it read added to its steps of late: more will come.
    """
    return worker.latency.step_s(*worker.batch_with(tokens)) + worker.latency.reading_adds_s


def reading_s(worker: WorkerState, work: Work) -> float:
    """Until it has read `work`, with the answers that it writes meanwhile, those it keeps of its own prompts
    included."""
    latency = worker.latency
    if not worker.blocks_placed:
        return latency.prefill.predict(work.features)
    batch = _meanwhile(worker)
    # One step is under way, half of it done.
    return latency.beside_s(work, *batch) + latency.step_s(*batch) / 2


def reading_std_s(worker: WorkerState, work: Work) -> float:
    """Standard deviation of an observation about `reading_s`."""
    latency = worker.latency
    if not worker.blocks_placed:
        return latency.prefill.std(work.features)
    return latency.beside_std_s(work, *_meanwhile(worker))


def _meanwhile(worker: WorkerState) -> tuple[int, int]:
    """Sequences and context of its steps, on average, until it has read what it has to: those whose prompts
    are read by then have joined."""
    (seqs, context), (now, context_now) = worker.batch, worker.decoding
    return (seqs + now + 1) // 2, (context + context_now + 1) // 2


def steps_between_s(worker: WorkerState, tokens: int) -> float:
    """What the answers that a decode worker writes take of the time in which it reads `tokens`."""
    if not worker.blocks_placed:
        return 0.0
    steps = math.ceil(tokens / max(worker.latency.chunk_tokens, 1.0))
    return (0.5 + steps) * worker.latency.step_s(*_meanwhile(worker))


def work_until(worker: WorkerState, tokens: int, goal: Goal, cached: int = 0) -> Work:
    """What it has to read until it has read this prompt."""
    ahead, start = worker.work_due(goal.due), min(cached, tokens - 1)
    pairs = ahead.pairs + (tokens * tokens - start * start) / 2
    return Work(ahead.prompts + 1, ahead.tokens + tokens - start, pairs)


def soonest_s(
    readers: Sequence[WorkerState], tokens: int, goal: Goal, *, deviations: float, enough_s: float = 0.0
) -> float:
    """When the first of them will have read the prompt, each prediction taken this many of its standard
    deviations above its mean. 0 while too little is known of one of them. One that will have read it within
    `enough_s` ends the search.
    """
    soonest = math.inf
    for worker in readers:
        if worker.latency.prefill.count < EVIDENCE:
            return 0.0
        work = work_until(worker, tokens, goal)
        wait_s = reading_s(worker, work)
        if deviations:
            wait_s += deviations * reading_std_s(worker, work)
        soonest = min(soonest, wait_s)
        if soonest <= enough_s:
            break
    return max(soonest, 0.0) if readers else 0.0


def late(predicted_s: float, target_s: float | None) -> float:
    """By how much of its target a prediction is late."""
    if target_s is None or predicted_s <= target_s:
        return 0.0
    return _MOST if target_s <= 0 else min(predicted_s / target_s - 1, _MOST)
