"""What a system's goodput comes to per core or GPU, and per million tokens."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.bench.search import Goodput
from pdserve.bench.suite import Run, SystemResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """At the rate where the goal is just met. None: not known."""

    requests_per_s_per_unit: float | None
    output_tokens_per_s: float
    unit_hours_per_million_tokens: float | None
    """Core-hours or GPU-hours for a million output tokens."""
    price_per_million_tokens: float | None
    requests_per_price: float | None
    """Requests for one unit of the currency."""


def cost_of(run: Run, system: SystemResult, goodput: Goodput) -> Cost | None:
    """None when no rate met the goal. Tokens are output tokens, as many per request as were measured."""
    if goodput.rate is None:
        return None
    answered = [r for trial in run.trials_of(system.name) for r in trial.counted if r.ok]
    mean_tokens = sum(r.output_tokens for r in answered) / len(answered) if answered else 0.0
    tokens_per_s = goodput.rate * mean_tokens
    hours = price = None
    if system.units is not None and tokens_per_s > 0:
        hours = system.units * 1e6 / tokens_per_s / 3600
        if system.price_per_unit_hour is not None:
            price = hours * system.price_per_unit_hour
    return Cost(
        requests_per_s_per_unit=goodput.rate / system.units if system.units else None,
        output_tokens_per_s=tokens_per_s,
        unit_hours_per_million_tokens=hours,
        price_per_million_tokens=price,
        requests_per_price=goodput.rate * 3600 / hourly if (hourly := hourly_price(system)) else None,
    )


def hourly_price(system: SystemResult) -> float | None:
    """Of the whole system; None when nobody said."""
    if system.units is None or system.price_per_unit_hour is None:
        return None
    return system.units * system.price_per_unit_hour


def hourly_cost(run: Run, system: SystemResult) -> float | None:
    """What a chart of all systems divides: prices when all have one, else units."""
    if all(hourly_price(one) is not None for one in run.systems):
        return hourly_price(system)
    return system.units


def cost_by_rate(run: Run, system: SystemResult) -> list[tuple[float, float]]:
    """(offered rate, cost of a million output tokens that were delivered inside their targets)."""
    hourly = hourly_cost(run, system)
    trials = run.trials_of(system.name)
    found = []
    for rate in sorted({trial.rate for trial in trials}):
        mine = [trial for trial in trials if trial.rate == rate]
        tokens = sum(record.output_tokens for trial in mine for record in trial.counted if record.met)
        seconds = sum(trial.wall_s for trial in mine)
        if hourly is not None and tokens and seconds:
            found.append((rate, hourly * 1e6 / (3600 * tokens / seconds)))
    return found
