"""How many guessed tokens of each sequence a step checks, and which of them stand. Pure.

A step computes the newest token and `depth` guesses after it, and samples every row: each with the (seed,
position) that the token has anyway, from the distribution given the guesses before it. The sampled tokens
are the answer as long as they equal the guesses, and one more. So the tokens are the very ones of plain
decoding, greedy or sampled, whatever was guessed.

Guesses must pay. The expected gain of the i-th is rate ** i, the rate being measured per sequence; its cost
is a row, and a step's time as a function of its rows is measured too. A guess is made while it raises
the expected tokens per second of the whole batch: not where the sequence is hard to guess, and not in a
large batch, whose steps are bound by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from decode.drafting import Drafter
from decode.run import DecodePlan, DecodeRun, Turn
from pdserve.core.ids import AttemptId
from pdserve.engine.batch import Sampled, SampleResult

_MEMORY: Final = 0.9
"""What is left of older evidence of a sequence's rate after each new guess."""
_FADE: Final = 0.01
"""Evidence that each step without a guess takes away: a sequence is tried again some time."""
_PRIOR_SAMPLES: Final = 2.0
_COST_MEMORY: Final = 0.99
_ASSUMED_ROW: Final = 0.05
"""Of a step's time, for one more row, until steps of different sizes have been seen."""
_MIN_STEPS: Final = 3
_TINY_S: Final = 1e-9
_SPREAD: Final = 0.05
"""Relative standard deviation of the rows of recent steps from which the slope is believed."""


class StepCost:
    """Seconds of a decode step as fixed + per_row * rows: least squares over recent steps."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._steps = 0

    def observe(self, rows: int, seconds: float) -> None:
        keep = _COST_MEMORY
        self._weight = keep * self._weight + 1.0
        self._x = keep * self._x + rows
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + rows * rows
        self._xy = keep * self._xy + rows * seconds
        self._steps += 1

    @property
    def known(self) -> bool:
        return self._steps >= _MIN_STEPS

    def line(self) -> tuple[float, float]:
        """(fixed, per_row), neither negative."""
        if not self._weight:
            return 0.0, 0.0
        x, y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - x * x
        if variance < (_SPREAD * x) ** 2:
            per_row = _ASSUMED_ROW * y
        else:
            per_row = max((self._xy / self._weight - x * y) / variance, 0.0)
        per_row = min(per_row, y / x)
        return y - per_row * x, per_row


@dataclass(slots=True)
class Rate:
    """How often a guess at one sequence holds, given that those before it did."""

    hits: float
    tries: float

    @property
    def value(self) -> float:
        return self.hits / self.tries

    def judged(self, depth: int, accepted: int) -> None:
        tries = min(accepted + 1, depth)
        self.hits = _MEMORY * self.hits + accepted
        self.tries = _MEMORY * self.tries + tries

    def fade(self, prior: float) -> None:
        self.hits += _FADE * (_PRIOR_SAMPLES * prior - self.hits)
        self.tries += _FADE * (_PRIOR_SAMPLES - self.tries)


def choose_depths(
    rates: Sequence[float],
    limits: Sequence[int],
    *,
    num_rows: int,
    fixed_s: float,
    per_row_s: float,
    per_depth_s: float = 0.0,
) -> list[int]:
    """Guesses per sequence that make the most expected tokens per second of a step of `num_rows` without any.

    per_depth_s: what the drafter takes for one more guess of everybody's.
    """
    best, best_rate = [0] * len(rates), num_rows / max(fixed_s + per_row_s * num_rows, _TINY_S)
    deepest = max(limits, default=0)
    # How deep the deepest goes is paid for once; within that, the likeliest guesses come first.
    for cap in range(1, deepest + 1) if per_depth_s else (deepest,):
        gains = [
            (rate**depth, i)
            for i, (rate, limit) in enumerate(zip(rates, limits, strict=True))
            for depth in range(1, min(limit, cap) + 1)
        ]
        depths, tokens = [0] * len(rates), float(num_rows)
        seconds = max(fixed_s + per_row_s * num_rows + per_depth_s * cap, _TINY_S)
        for gain, i in sorted(gains, reverse=True):
            if gain * seconds <= tokens * per_row_s:
                break
            depths[i] += 1
            tokens, seconds = tokens + gain, seconds + per_row_s
        if tokens / seconds > best_rate:
            best, best_rate = depths, tokens / seconds
    return best


def standing(drafts: Sequence[int], results: Sequence[SampleResult]) -> list[SampleResult]:
    """The sampled tokens that plain decoding would have come to: up to the first that is not its guess."""
    kept = []
    for index, result in enumerate(results):
        kept.append(result)
        guessed = index < len(drafts) and isinstance(result, Sampled) and result.token == drafts[index]
        if not guessed:
            break
    return kept


class Speculation:
    """The guesses of one decode worker: how deep, how good, and what a step costs."""

    def __init__(self, drafter: Drafter, *, num_tokens: int, adaptive: bool, max_len: int) -> None:
        """num_tokens: guesses at one sequence in one step at most. Not adaptive: always so many."""
        self._drafter, self._num_tokens, self._adaptive = drafter, num_tokens, adaptive
        self._max_len = max_len
        self._cost = StepCost()
        self._rates: dict[AttemptId, Rate] = {}
        self._overall = Rate(0.5 * _PRIOR_SAMPLES, _PRIOR_SAMPLES)
        self._per_depth_s = 0.0
        self.proposed_at = [0] * num_tokens
        self.accepted_at = [0] * num_tokens

    def plan(self, turns: Sequence[Turn], room: Callable[[DecodeRun, int], int], budget: int) -> None:
        """Set the depth of each turn. `room`: how many more tokens a sequence's blocks can take, of so many.
        budget: guesses of the step at most."""
        if self._adaptive and not self._cost.known:
            return
        fixed_s, per_row_s = self._cost.line()
        limits = [self._limit(turn.run, len(turns), fixed_s, per_row_s) for turn in turns]
        depths = limits
        if self._adaptive:
            depths = choose_depths(
                [self._rate(turn.run).value for turn in turns],
                limits,
                num_rows=len(turns),
                fixed_s=fixed_s,
                per_row_s=per_row_s,
                per_depth_s=self._per_depth_s,
            )
        for turn, depth in zip(turns, depths, strict=True):
            turn.depth = room(turn.run, min(depth, budget)) if depth and budget > 0 else 0
            budget -= turn.depth
            if not turn.depth:
                self._rate(turn.run).fade(self._overall.value)

    def fill(self, plan: DecodePlan, clock: Callable[[], float]) -> None:
        """Have the guesses made. Part of the step: it may take time."""
        drafted = [turn for turn in plan.turns if turn.depth]
        if not drafted:
            return
        began = clock()
        self._drafter.fill(drafted)
        plan.drafting_s = clock() - began

    def judged(self, turn: Turn, num_accepted: int) -> None:
        depth = len(turn.drafts)
        if not depth:
            return
        for position in range(depth):
            self.proposed_at[position] += 1
            self.accepted_at[position] += position < num_accepted
        for rate in (self._rate(turn.run), self._overall):
            rate.judged(depth, num_accepted)

    def stepped(self, plan: DecodePlan, seconds: float) -> None:
        """A step took so long, drafting included."""
        if not plan.alone or not all(turn.decodes for turn in plan.turns):
            return
        self._cost.observe(sum(1 + len(turn.drafts) for turn in plan.turns), seconds - plan.drafting_s)
        depth = max(len(turn.drafts) for turn in plan.turns)
        if depth:
            self._per_depth_s += 0.1 * (plan.drafting_s / depth - self._per_depth_s)

    def forget(self, run: DecodeRun) -> None:
        self._rates.pop(run.attempt, None)
        self._drafter.forget(run.attempt)

    def _limit(self, run: DecodeRun, num_rows: int, fixed_s: float, per_row_s: float) -> int:
        """As many as could be of use: the last token of an answer is never guessed."""
        if self._adaptive:
            # What could not pay even as the only guess is not looked for.
            best = self._rate(run).value * (fixed_s + per_row_s * num_rows)
            if best <= num_rows * per_row_s:
                return 0
        if run.leaving or run.reading:
            return 0
        left = run.spec.sampling.max_tokens - run.num_output - 1
        wanted = min(self._num_tokens, left, self._max_len - len(run.tokens) - 1)
        return self._drafter.limit(run, wanted) if wanted > 0 else 0

    def _rate(self, run: DecodeRun) -> Rate:
        rate = self._rates.get(run.attempt)
        if rate is None:
            value = self._overall.value
            rate = self._rates[run.attempt] = Rate(value * _PRIOR_SAMPLES, _PRIOR_SAMPLES)
        return rate
