"""What a rate will be, from what it was: exponential smoothing with a damped trend and, if asked, a season.

    level  l = a (y - s) + (1 - a) (l + p b)
    trend  b = g (l - l') + (1 - g) p b          p < 1: a trend does not go on for ever
    season s = d (y - l) + (1 - d) s             of the same time a season earlier

C. C. Holt (1957), P. R. Winters (1960); damping after E. S. Gardner and E. McKenzie (1985).
"""

from __future__ import annotations

import math
from typing import Final

LEVEL: Final = 0.4
TREND: Final = 0.15
DAMPING: Final = 0.85
SEASON: Final = 0.3
_TRACK: Final = 0.15
"""Of the newest error in the moving average of squared errors."""


class Forecast:
    """Of a quantity that is >= 0 and observed once per interval."""

    def __init__(self, *, season: int = 0) -> None:
        """season: intervals after which the load repeats; 0: it does not."""
        self.count = 0
        self._level = self._trend = 0.0
        self._season: list[float] = [0.0] * season
        self._variance = 0.0

    def observe(self, value: float) -> None:
        if not self.count:
            self._level = value
        else:
            miss = value - self.predict(1)
            track = max(_TRACK, 1 / (self.count + 1))
            self._variance += track * (miss * miss - self._variance)
            before = self._level
            seasonal = self._seasonal(0)
            self._level = LEVEL * (value - seasonal) + (1 - LEVEL) * (before + DAMPING * self._trend)
            self._trend = TREND * (self._level - before) + (1 - TREND) * DAMPING * self._trend
        if self._season:
            place = self.count % len(self._season)
            self._season[place] += SEASON * (value - self._level - self._season[place])
        self.count += 1

    def predict(self, ahead: int) -> float:
        """The mean of the interval `ahead` after the last one observed."""
        damped = sum(DAMPING**i for i in range(1, ahead + 1))
        return max(self._level + damped * self._trend + self._seasonal(ahead - 1), 0.0)

    def std(self, ahead: int) -> float:
        """Of `predict(ahead)`: an error is carried on by the part of it that enters the level."""
        return math.sqrt(self._variance * (1 + (ahead - 1) * LEVEL**2))

    def _seasonal(self, after_next: int) -> float:
        """Of the interval this many after the next one; nothing is known in the first season."""
        length = len(self._season)
        return self._season[(self.count + after_next) % length] if 0 < length <= self.count else 0.0
