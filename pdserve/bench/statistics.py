"""Intervals: what a few hundred requests say about the rate at which targets are met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final

import numpy as np

QUANTILES: Final = (50, 90, 95, 99)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """mean, p50, p90, p95, p99 and max; empty for no values."""
    if not values:
        return {}
    found = np.percentile(values, QUANTILES)
    named = {f"p{q}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": float(max(values))}


def wilson(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion (Wilson, 1927); (0, 1) when nothing was tried."""
    if trials <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def correlation_time(met: Sequence[bool]) -> float | None:
    """How many neighbouring requests are worth one independent one; None when all ended alike.

    Requests that share a queue miss together. 1 + 2 * (the sum of autocorrelations until they reach zero: the
    initial positive sequence of Geyer, 1992).
    """
    values = np.asarray(met, dtype=float)
    n = len(values)
    if n < 4 or values.min() == values.max():
        return None
    centred = values - values.mean()
    spectrum = np.abs(np.fft.rfft(centred, 2 * n)) ** 2
    correlations = np.fft.irfft(spectrum)[: n // 2]
    correlations /= correlations[0]
    ends = np.nonzero(correlations <= 0)[0]
    positive = correlations[1 : int(ends[0]) if len(ends) else len(correlations)]
    return float(1 + 2 * positive.sum())


def studentised_mean_test(
    differences: Sequence[float], random: np.random.Generator, *, num_resamples: int = 4000
) -> tuple[float, tuple[float, float]]:
    """Is the mean of paired differences zero? Returns the two-sided p value and the 95% interval of the mean.

    Bootstrap of the t statistic (Efron and Tibshirani, 1993, chapter 12 and 16): unlike the plain percentile
    bootstrap it keeps its promise with a handful of pairs. Needs at least 2.
    """
    values = np.asarray(differences, dtype=float)
    n, mean = len(values), float(np.mean(values))
    error = float(values.std(ddof=1)) / math.sqrt(n)
    if error == 0.0:
        return (1.0 if mean == 0.0 else 1 / num_resamples), (mean, mean)
    drawn = values[random.integers(0, n, size=(num_resamples, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (drawn.mean(axis=1) - mean) / errors
    # A resample of one value repeated says nothing about spread: the most extreme, as it was.
    t = np.where(np.isnan(t), 0.0, t)
    p = (1 + float(np.sum(np.abs(t) >= abs(mean / error)))) / (num_resamples + 1)
    low, high = np.percentile(t[np.isfinite(t)], [2.5, 97.5])
    return p, (mean - float(high) * error, mean - float(low) * error)
