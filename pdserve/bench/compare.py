"""Is one run really slower than another? Requests are paired, and pairs are resampled.

Both runs sent the same requests at the same moments (same scenario, seed, rate and round), so each request is
its own control. Neighbours wait in the same queue and are not independent: what is resampled are whole
rounds where there are enough, else stretches of a round.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from pdserve.bench.report.files import Measured
from pdserve.bench.statistics import studentised_mean_test
from pdserve.core.errors import ConfigError

MIN_ROUNDS: Final = 5
"""From so many pairs of rounds on, rounds are the units."""
MIN_UNITS: Final = 5
_SEED: Final = 20_261_120


class Unit(StrEnum):
    ROUND = "round"
    STRETCH = "stretch of a round"


class Change(StrEnum):
    WORSE = "worse"
    BETTER = "better"
    NONE = "no real difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    metric: str
    change: Change
    effect: float
    """Latencies: relative change of B to A (0.1: 10% slower). Attainment: B minus A, as a fraction."""
    low: float
    high: float
    """95% interval of `effect`."""
    p: float
    """Adjusted for the number of metrics (Holm)."""
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    outcomes: list[Outcome]
    unit: Unit
    num_units: int
    num_pairs: int
    num_unpaired: int
    """Requests that only one of the two has."""

    @property
    def regressed(self) -> bool:
        return any(outcome.change is Change.WORSE for outcome in self.outcomes)


Pair = tuple[Measured, Measured]


def compare(
    a: Sequence[Measured], b: Sequence[Measured], *, alpha: float = 0.05, min_effect: float = 0.03
) -> Comparison:
    """B against A. A difference is real when its adjusted p is below `alpha` and it is at least `min_effect`.

    Raises `ConfigError` when too few requests of the two can be paired.
    """
    groups, num_unpaired = _pairs(a, b)
    unit, units = _units(groups)
    if len(units) < MIN_UNITS:
        raise ConfigError(
            f"the runs have {sum(map(len, groups))} requests in common, in {len(units)} parts, and at least "
            f"{MIN_UNITS} are needed: run both with the same scenario, seed and --rates, and --rounds 5"
        )
    raw = [found for name in _METRICS if (found := _test(name, units)) is not None]
    adjusted = _holm([test.p for test in raw])
    outcomes = [_judge(test, p, alpha, min_effect) for test, p in zip(raw, adjusted, strict=True)]
    return Comparison(
        outcomes=outcomes,
        unit=unit,
        num_units=len(units),
        num_pairs=sum(map(len, groups)),
        num_unpaired=num_unpaired,
    )


def select(measured: Sequence[Measured], system: str | None, where: str) -> list[Measured]:
    """One system of a run. Raises `ConfigError` when it must be named, or is not there."""
    names = sorted({one.system for one in measured})
    if system is None and len(names) == 1:
        return list(measured)
    if system is None:
        raise ConfigError(f"{where} has several systems ({', '.join(names)}): choose one with --system")
    if system not in names:
        raise ConfigError(f"{where} has no system {system!r}; it has {', '.join(names) or 'none'}")
    return [one for one in measured if one.system == system]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Test:
    metric: str
    mean: float
    low: float
    high: float
    p: float
    num_pairs: int


def _pairs(a: Sequence[Measured], b: Sequence[Measured]) -> tuple[list[list[Pair]], int]:
    """Pairs by rate and round, in order of intended time."""
    theirs = {_key(one): one for one in b}
    groups: dict[tuple[float, int], list[Pair]] = defaultdict(list)
    for one in sorted(a, key=lambda m: (m.rate, m.round, m.intended_s, m.session, m.turn)):
        if (other := theirs.get(_key(one))) is not None:
            groups[one.rate, one.round].append((one, other))
    num_pairs = sum(map(len, groups.values()))
    return list(groups.values()), len(a) + len(b) - 2 * num_pairs


def _key(one: Measured) -> tuple[float, int, int, int]:
    return one.rate, one.round, one.session, one.turn


def _units(groups: Sequence[list[Pair]]) -> tuple[Unit, list[list[Pair]]]:
    rounds = {pair[0].round for group in groups for pair in group}
    if len(rounds) >= MIN_ROUNDS:
        by_round: dict[int, list[Pair]] = defaultdict(list)
        for group in groups:
            by_round[group[0][0].round] += group
        return Unit.ROUND, list(by_round.values())
    stretches: list[list[Pair]] = []
    for group in groups:
        length = max(1, math.ceil(math.sqrt(len(group))))
        stretches += [group[at : at + length] for at in range(0, len(group), length)]
    return Unit.STRETCH, stretches


def _log_ratio(field: str) -> Callable[[Pair], float | None]:
    def value(pair: Pair) -> float | None:
        before, after = getattr(pair[0], field), getattr(pair[1], field)
        return math.log(after / before) if before and after and before > 0 and after > 0 else None

    return value


def _attained(pair: Pair) -> float | None:
    return float(pair[1].met) - float(pair[0].met)


_METRICS: Final[dict[str, Callable[[Pair], float | None]]] = {
    "attainment": _attained,
    "ttft": _log_ratio("ttft_s"),
    "tpot": _log_ratio("tpot_s"),
    "itl_p99": _log_ratio("itl_p99_s"),
    "e2e": _log_ratio("e2e_s"),
}


def _test(name: str, units: Sequence[list[Pair]]) -> _Test | None:
    """None when too few requests have this figure in both runs."""
    means, num_pairs = [], 0
    for unit in units:
        values = [value for pair in unit if (value := _METRICS[name](pair)) is not None]
        if values:
            means.append(float(np.mean(values)))
            num_pairs += len(values)
    if len(means) < MIN_UNITS:
        return None
    p, (low, high) = studentised_mean_test(means, np.random.default_rng(_SEED))
    return _Test(metric=name, mean=float(np.mean(means)), low=low, high=high, p=p, num_pairs=num_pairs)


def _holm(ps: Sequence[float]) -> list[float]:
    """Holm, 1979: the chance of any false alarm among all metrics stays below alpha."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, ps[index] * (len(ps) - rank)))
        adjusted[index] = highest
    return adjusted


def _judge(test: _Test, p: float, alpha: float, min_effect: float) -> Outcome:
    is_latency = test.metric != "attainment"
    effect, low, high = (math.expm1(v) if is_latency else v for v in (test.mean, test.low, test.high))
    change = Change.NONE
    if p < alpha and abs(effect) >= min_effect:
        change = Change.WORSE if (effect > 0) == is_latency else Change.BETTER
    return Outcome(
        metric=test.metric, change=change, effect=effect, low=low, high=high, p=p, num_pairs=test.num_pairs
    )
