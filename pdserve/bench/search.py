"""The highest rate at which enough requests meet their targets: a search without I/O.

    next_rate() -> run a trial -> tell(rate, met) -> next_rate() -> ... -> None -> estimate(attainment)

First doubling (or halving) until the goal is met on one side and missed on the other, then bisection of the
bracket's logarithm. A trial whose interval holds the goal is unclear: it is repeated before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from pdserve.bench.scenario import Search
from pdserve.bench.statistics import correlation_time, wilson

MAX_REPEATS: Final = 3
"""Trials of one rate; after these its mean decides."""
MIN_RATE_PART: Final = 1 / 256
"""Of the starting rate: where even this misses, no rate is found."""
_GROWTH: Final = 2.0


class Verdict(StrEnum):
    MET = "met"
    MISSED = "missed"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """All trials of one rate together."""

    rate: float
    num_requests: int
    num_met: int
    effective: float
    """Independent requests they are worth."""
    num_trials: int

    @property
    def attainment(self) -> float:
        return self.num_met / self.num_requests if self.num_requests else 0.0

    def interval(self) -> tuple[float, float]:
        return wilson(self.attainment * self.effective, self.effective)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """The estimate for one attainment. None: outside what was tried."""

    attainment: float
    rate: float | None
    low: float | None
    high: float | None
    """95% interval of `rate`; a missing end lies beyond the rates that were tried."""


def at_least(goodput: Goodput, points: Sequence[Point]) -> float | None:
    """The rate that was found, or the highest tried where that met the goal too; None: none did."""
    if goodput.rate is not None or not points:
        return goodput.rate
    lowest = min(points, key=_rate)
    return max(map(_rate, points)) if lowest.attainment >= goodput.attainment else None


class GoodputSearch:
    def __init__(self, settings: Search) -> None:
        self._settings = settings
        self._trials: dict[float, list[list[bool]]] = {}
        self._spent_s = 0.0

    def next_rate(self) -> float | None:
        """The rate to try next; None when the bracket is narrow enough, or time is up."""
        settings = self._settings
        if not self._trials:
            return settings.start_rate
        if self._spent_s >= settings.budget_s:
            return None
        low, high = self._bracket()
        unclear = [
            p.rate for p in self.points() if self._verdict(p) is Verdict.UNCLEAR and low <= p.rate <= high
        ]
        if unclear:
            return min(unclear)
        if math.isinf(high):
            wider = min(low * _GROWTH, settings.max_rate)
            return wider if wider > low else None
        if low == 0.0:
            lower = high / _GROWTH
            return lower if lower >= settings.start_rate * MIN_RATE_PART else None
        if high / low <= 1 + settings.precision:
            return None
        return math.sqrt(low * high)

    def tell(self, rate: float, met: Sequence[bool], spent_s: float) -> None:
        """A trial's requests in order of intended time, and how long it took."""
        self._spent_s += spent_s
        self._trials.setdefault(rate, []).append(list(met))

    def points(self) -> list[Point]:
        """By rate."""
        return self._points(one_per_trial=False)

    def _points(self, *, one_per_trial: bool) -> list[Point]:
        all_trials = [met for trials in self._trials.values() for met in trials if met]
        # A trial without a miss does not show how requests hang together: others tell.
        known = [time for met in all_trials if (time := correlation_time(met)) is not None]
        typical = float(np.min(known)) if known else 1.0
        groups = [
            (rate, group)
            for rate, trials in sorted(self._trials.items())
            for group in ([[met] for met in trials] if one_per_trial else [trials])
        ]
        return [_point(rate, group, typical) for rate, group in groups]

    @property
    def spent_s(self) -> float:
        return self._spent_s

    def estimate(self, attainment: float, *, seed: int = 0, num_resamples: int = 1000) -> Goodput:
        """Where attainment falls below the goal, and its interval from resampled trials."""
        points = self.points()
        rates = [point.rate for point in points]
        weights = [max(point.effective, 1e-9) for point in points]
        shares = [point.attainment for point in points]
        found = crossing(rates, shares, weights, attainment)
        random = np.random.default_rng(seed)
        singles = self._points(one_per_trial=True)
        crossings: list[float] = []
        for _ in range(num_resamples):
            # Whole trials are drawn first: two at one rate differ by more than their requests explain.
            # The outermost stay: without them a draw would say nothing of where the curve ends.
            drawn = (0, *random.integers(0, len(singles), max(0, len(singles) - 2)), len(singles) - 1)
            chosen = sorted((singles[i] for i in drawn), key=_rate)
            at = crossing(
                [p.rate for p in chosen],
                # Beta(1/2 + met, 1/2 + missed): a trial that met every target does not prove 100%.
                [
                    float(
                        random.beta(0.5 + p.attainment * p.effective, 0.5 + (1 - p.attainment) * p.effective)
                    )
                    for p in chosen
                ],
                [p.effective for p in chosen],
                attainment,
            )
            crossings.append(at.rate if at.rate is not None else (0.0 if at.below else math.inf))
        low, high = (float(np.quantile(crossings, q, method="nearest")) for q in (0.025, 0.975))
        if found.rate is not None:
            low, high = min(low, found.rate), max(high, found.rate)
        return Goodput(
            attainment=attainment,
            rate=found.rate,
            low=low if 0 < low < math.inf else None,
            high=high if 0 < high < math.inf else None,
        )

    def _bracket(self) -> tuple[float, float]:
        """(highest rate that met, lowest above it that missed); 0 and infinity where there is none."""
        missed = [p.rate for p in self.points() if self._leaning(p) is Verdict.MISSED]
        high = min(missed, default=math.inf)
        low = max((p.rate for p in self.points() if p.rate < high), default=0.0)
        return low, high

    def _verdict(self, point: Point) -> Verdict:
        low, high = point.interval()
        goal = self._settings.goal
        if low >= goal or (point.attainment == 1.0 and point.num_requests):
            return Verdict.MET
        if high < goal:
            return Verdict.MISSED
        return self._leaning(point) if point.num_trials >= MAX_REPEATS else Verdict.UNCLEAR

    def _leaning(self, point: Point) -> Verdict:
        return Verdict.MET if point.attainment >= self._settings.goal else Verdict.MISSED


@dataclass(frozen=True, slots=True)
class Crossing:
    rate: float | None
    below: bool = False
    """With no rate: attainment is too low everywhere (else: high enough everywhere)."""


def crossing(
    rates: Sequence[float], shares: Sequence[float], weights: Sequence[float], goal: float
) -> Crossing:
    """Where a falling curve through the points meets `goal`, between two rates by their logarithm."""
    falling = falling_fit(shares, weights)
    if not falling or falling[0] < goal:
        return Crossing(None, below=True)
    for index in range(1, len(rates)):
        if falling[index] < goal:
            before, after = falling[index - 1], falling[index]
            part = (before - goal) / (before - after)
            return Crossing(rates[index - 1] * (rates[index] / rates[index - 1]) ** part)
    return Crossing(None)


def falling_fit(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest non-increasing sequence (pool adjacent violators): more load never helps."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (v2, w2, n2), (v1, w1, n1) = pools.pop(), pools.pop()
            pools.append(((v1 * w1 + v2 * w2) / (w1 + w2), w1 + w2, n1 + n2))
    return [value for value, _, count in pools for _ in range(count)]


def _rate(point: Point) -> float:
    return point.rate


def _point(rate: float, trials: Sequence[Sequence[bool]], typical: float) -> Point:
    """`typical`: the correlation time for trials that show none, because all their requests ended alike."""
    effective = 0.0
    for met in trials:
        effective += max(min(1.0, len(met)), len(met) / (correlation_time(met) or typical))
    return Point(
        rate=rate,
        num_requests=sum(map(len, trials)),
        num_met=sum(sum(met) for met in trials),
        effective=effective,
        num_trials=len(trials),
    )
