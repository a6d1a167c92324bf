"""What is asked of a model: how often, how long, and how soon it shall come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from coordinator.planner.forecast import Forecast

_NEWEST: Final = 0.35
"""Of the newest interval in the moving averages of lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Forecast for some time from now. Lengths in tokens, times in seconds."""

    rate: float
    """Requests per second."""
    rate_std: float
    prompt: float
    """Mean tokens to read: without those that prefix caches have."""
    prompt_square: float
    """Mean of their squares."""
    context: float
    """Mean prompt, cached or not."""
    answer: float
    ttft_s: float = math.inf
    """What requests ask for, the mean of those that do."""
    tpot_s: float = math.inf


@dataclass(slots=True)
class _Mean:
    """Of an interval, and moving over the intervals."""

    value: float = 0.0
    known: bool = False
    _sum: float = 0.0
    _count: int = 0

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1

    def close(self) -> None:
        """The interval has ended. One with few observations counts for less."""
        if not self._count:
            return
        mean, count = self._sum / self._count, self._count
        self._sum, self._count = 0.0, 0
        weight = 1.0 if not self.known else _NEWEST * count / (count + 2)
        self.value += weight * (mean - self.value)
        self.known = True


@dataclass(slots=True)
class DemandTracker:
    """Told of every request of one model; cuts time into intervals."""

    interval_s: float
    season_s: float = 0.0
    """After which the load repeats, such as a day; 0: not known to."""
    _rate: Forecast = field(init=False)
    _arrived: int = 0
    _until: float | None = None
    _prompt: _Mean = field(default_factory=_Mean)
    _square: _Mean = field(default_factory=_Mean)
    _answer: _Mean = field(default_factory=_Mean)
    _read: _Mean = field(default_factory=_Mean)
    """Part of a prompt that was read, not found in a cache."""
    _ttft: _Mean = field(default_factory=_Mean)
    _tpot: _Mean = field(default_factory=_Mean)

    def __post_init__(self) -> None:
        self._rate = Forecast(season=round(self.season_s / self.interval_s))

    def arrived(
        self, prompt_tokens: int, ttft_target_s: float | None, tpot_target_s: float | None, now: float
    ) -> None:
        self.advance(now)
        self._arrived += 1
        self._prompt.add(prompt_tokens)
        self._square.add(prompt_tokens * prompt_tokens)
        if ttft_target_s is not None:
            self._ttft.add(ttft_target_s)
        if tpot_target_s is not None:
            self._tpot.add(tpot_target_s)

    def answered(self, prompt_tokens: int, cached_tokens: int, output_tokens: int, now: float) -> None:
        """A request has ended with its whole answer."""
        self.advance(now)
        self._answer.add(output_tokens)
        self._read.add(1 - min(cached_tokens / max(prompt_tokens, 1), 1.0))

    def advance(self, now: float) -> None:
        """Close the intervals that have ended."""
        if self._until is None:
            self._until = now + self.interval_s
        while now >= self._until:
            self._rate.observe(self._arrived / self.interval_s)
            self._arrived = 0
            for mean in (self._prompt, self._square, self._answer, self._read, self._ttft, self._tpot):
                mean.close()
            self._until += self.interval_s

    def demand(self, ahead_s: float) -> Demand | None:
        """Forecast of the time `ahead_s` from now; None while too little was seen."""
        if self._rate.count < 2 or not (self._prompt.known and self._answer.known):
            return None
        ahead = max(round(ahead_s / self.interval_s), 1)
        read = self._read.value
        return Demand(
            rate=self._rate.predict(ahead),
            rate_std=self._rate.std(ahead),
            prompt=max(self._prompt.value * read, 1.0),
            prompt_square=max(self._square.value * read * read, 1.0),
            context=self._prompt.value,
            answer=max(self._answer.value, 1.0),
            ttft_s=self._ttft.value if self._ttft.known else math.inf,
            tpot_s=self._tpot.value if self._tpot.known else math.inf,
        )
