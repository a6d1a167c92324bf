"""Least squares with forgetting for a few non-negative coefficients, learned one observation at a time.

Errors are relative: a step of 10 ms that is predicted as 11 ms counts as one of 1 s predicted as 1.1 s. Each
observation (x, y) enters as x/y -> 1, so with z = prior * x / y the coefficients w solve

    (S + k I) w = t + k 1,    S = sum of f^age z z',    t = sum of f^age z

which is Bayesian linear regression around the prior (w = 1) that is never forgotten: without observations of
some kind, what is not observed drifts back to the prior instead of away. The first observation sets the
prior's scale: its ratios are worth more than its units. Coefficients are kept from falling
below zero by dropping the most negative one and solving again: more work never takes less time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

FORGETTING: Final = 0.98
"""Weight of an observation for each one after it: about the last fifty count."""
_RIDGE: Final = 1e-4
"""Weight of the prior, against 1 for an observation at the prior's value."""
_NOISE: Final = 0.1
"""Relative error of one observation that is to be expected before any is known."""
_TRACK: Final = 0.05
"""Of the newest observation in the moving averages of errors."""
_LEARNING: Final = 10
"""Observations before any is taken for an outlier."""
_SMALLEST: Final = 8.0
"""An observation counts as this many times below its prediction at least."""
_OUTLIER: Final = 4.0
"""An observation counts at most as much as one that is off by this many standard deviations."""


class LinearFit:
    """seconds = sum of coefficient * feature, all coefficients >= 0, with what it is worth."""

    def __init__(self, prior: Sequence[float], *, trusted: bool = False) -> None:
        """prior: seconds per unit of each feature, > 0. trusted: also its scale, not only its ratios."""
        if not prior or min(prior) <= 0:
            raise ValueError(f"wanted positive prior coefficients, got {list(prior)}")
        size = len(prior)
        self._prior = tuple(prior)
        self._s = [[0.0] * size for _ in range(size)]
        self._t = [0.0] * size
        self._coefficients: tuple[float, ...] = self._prior
        self._stale = False
        self._inverse: list[list[float]] | None = None
        self._trusted = trusted
        self._variance = _NOISE**2
        self.error = 0.0
        """Calibration error: mean of |predicted - observed| / observed, each before it was learned."""
        self.count = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per unit of each feature."""
        return self._solved() if self._stale else self._coefficients

    def predict(self, x: Sequence[float]) -> float:
        known = self._solved() if self._stale else self._coefficients
        if len(known) == 3:  # asked for dozens of times for one decision
            (a, b, c), (u, v, w) = known, x
            return a * u + b * v + c * w
        return _dot(known, x)

    def _solved(self) -> tuple[float, ...]:
        self._coefficients, self._stale = self._solve(), False
        return self._coefficients

    def std(self, x: Sequence[float]) -> float:
        """Standard deviation of an observation about `predict(x)`: scatter so far, and what is unknown."""
        if self._inverse is None:
            self._inverse = _inverse(self._normal())
        if len(x) == 3:
            (p, q, r), (u, v, w) = self._prior, x
            u, v, w = p * u, q * v, r * w
            (a, b, c), (_, d, e), (_, _, f) = self._inverse
            unknown = a * u * u + d * v * v + f * w * w + 2 * (b * u * v + c * u * w + e * v * w)
        else:
            scaled = [p * v for p, v in zip(self._prior, x, strict=True)]
            unknown = _dot(scaled, [_dot(row, scaled) for row in self._inverse])
        return math.sqrt(self._variance * self.predict(x) ** 2 + unknown * _NOISE**2)

    def learn(self, x: Sequence[float], y: float) -> None:
        """One observation of `y` > 0 seconds; others are ignored."""
        if y <= 0 or not math.isfinite(y):
            return
        if not self.count and not self._trusted:
            self._rescale(x, y)
        elif self.count:
            # Errors are relative, so one that is far too small would outweigh all others for long.
            y = max(y, self.predict(x) / _SMALLEST)
        miss = (self.predict(x) - y) / y
        weight = 1.0
        if self.count >= _LEARNING:
            limit = _OUTLIER * max(math.sqrt(self._variance), _NOISE)
            weight = min(1.0, limit / abs(miss)) if miss else 1.0
        track = max(_TRACK, 1 / (self.count + 1))
        self.error += track * (abs(miss) - self.error)
        self._variance += track * (min(miss * miss, 1.0) - self._variance)
        z = [p * v / y for p, v in zip(self._prior, x, strict=True)]
        self._t = [FORGETTING * total + weight * zi for total, zi in zip(self._t, z, strict=True)]
        for row, zi in zip(self._s, z, strict=True):
            share = weight * zi
            row[:] = [FORGETTING * total + share * zj for total, zj in zip(row, z, strict=True)]
        self.count += 1
        self._stale, self._inverse = True, None

    def _rescale(self, x: Sequence[float], y: float) -> None:
        predicted = self.predict(x)
        if predicted > 0:
            self._coefficients = self._prior = tuple(p * y / predicted for p in self._prior)

    def _normal(self) -> list[list[float]]:
        matrix = [row.copy() for row in self._s]
        for i, row in enumerate(matrix):
            row[i] += _RIDGE
        return matrix

    def _solve(self) -> tuple[float, ...]:
        matrix, right = self._normal(), [value + _RIDGE for value in self._t]
        if len(right) == 3:
            self._inverse = _inverse(matrix)
            u, v, r = right
            found = [a * u + b * v + c * r for a, b, c in self._inverse]
        else:
            found = _solve(matrix, right)
        if min(found) >= 0:
            return tuple([ratio * p for ratio, p in zip(found, self._prior, strict=True)])
        kept = list(range(len(right)))
        while kept:
            w = _solve([[matrix[i][j] for j in kept] for i in kept], [right[i] for i in kept])
            worst = min(range(len(kept)), key=w.__getitem__)
            if w[worst] >= 0:
                of = dict(zip(kept, w, strict=True))
                return tuple(of.get(i, 0.0) * p for i, p in enumerate(self._prior))
            del kept[worst]
        return self._prior


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    # Asked for dozens of times for one decision, nearly always of these sizes.
    if len(a) == len(b) == 3:
        return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    if len(a) == len(b) == 2:
        return a[0] * b[0] + a[1] * b[1]
    return sum(x * y for x, y in zip(a, b, strict=True))


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Of a symmetric and positive definite matrix."""
    if len(matrix) != 3:
        units = range(len(matrix))
        return [_solve(matrix, [float(i == j) for j in units]) for i in units]
    (a, b, c), (_, d, e), (_, _, f) = matrix
    one, two, three = d * f - e * e, c * e - b * f, b * e - c * d
    determinant = a * one + b * two + c * three
    if determinant <= 1e-12 * a * d * f:  # too close to singular for this many digits
        return [_solve(matrix, [float(i == j) for j in range(3)]) for i in range(3)]
    four, five, six = a * f - c * c, b * c - a * e, a * d - b * b
    return [
        [one / determinant, two / determinant, three / determinant],
        [two / determinant, four / determinant, five / determinant],
        [three / determinant, five / determinant, six / determinant],
    ]


def _solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Gauss without pivoting: the matrix is symmetric and positive definite."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i, pivot in enumerate(rows):
        for j in range(i + 1, size):
            factor = rows[j][i] / pivot[i]
            # What is left of the diagonal is not looked at again.
            rows[j] = [value - factor * other for value, other in zip(rows[j], pivot, strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        row = rows[i]
        rest = row[size]
        for k in range(i + 1, size):
            rest -= row[k] * found[k]
        found[i] = rest / row[i]
    return found
