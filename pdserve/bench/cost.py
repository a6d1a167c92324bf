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
    )
