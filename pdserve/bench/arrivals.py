"""When requests arrive: open loop, so that a slow server is not asked less."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from pdserve.bench.distributions import Frozen


class ArrivalKind(StrEnum):
    POISSON = "poisson"
    GAMMA = "gamma"
    UNIFORM = "uniform"
    DIURNAL = "diurnal"
    STEP = "step"


class Arrivals(Frozen):
    """A process of a given mean rate."""

    kind: ArrivalKind = ArrivalKind.POISSON
    cv: float = Field(default=2.0, gt=0, le=20)
    """gamma: coefficient of variation of the gaps; 1 is Poisson, above 1 comes in bursts."""
    amplitude: float = Field(default=0.5, ge=0, le=1)
    """diurnal: the rate swings by this part of its mean."""
    period_s: float = Field(default=60.0, gt=0)
    """diurnal: length of a day."""
    factor: float = Field(default=2.0, gt=0)
    """step: the rate after the step over the rate before it."""
    step_at: float = Field(default=0.5, gt=0, lt=1)
    """step: when, as a part of the whole duration."""

    @model_validator(mode="after")
    def _day(self) -> Self:
        if self.kind is not ArrivalKind.DIURNAL and "period_s" in self.model_fields_set:
            raise ValueError("period_s is of kind diurnal")
        return self

    def times(self, rate: float, duration_s: float, random: np.random.Generator) -> list[float]:
        """Ascending times in [0, duration_s) of a process with `rate` arrivals per second on average."""
        match self.kind:
            case ArrivalKind.UNIFORM:
                return [index / rate for index in range(math.ceil(rate * duration_s))]
            case ArrivalKind.POISSON:
                return _renewals(rate, duration_s, random, cv=1.0)
            case ArrivalKind.GAMMA:
                return _renewals(rate, duration_s, random, cv=self.cv)
            case ArrivalKind.DIURNAL | ArrivalKind.STEP:
                return self._varying(rate, duration_s, random)

    def intensity(self, fraction_or_time: float, duration_s: float) -> float:
        """The rate at a time, over its mean."""
        if self.kind is ArrivalKind.DIURNAL:
            return 1 + self.amplitude * math.sin(2 * math.pi * fraction_or_time / self.period_s)
        if self.kind is ArrivalKind.STEP:
            before = 1 / (self.step_at + self.factor * (1 - self.step_at))
            return before * (self.factor if fraction_or_time >= self.step_at * duration_s else 1.0)
        return 1.0

    def _varying(self, rate: float, duration_s: float, random: np.random.Generator) -> list[float]:
        """By thinning (Lewis and Shedler, 1979): candidates at the peak rate, kept in proportion."""
        before = 1 / (self.step_at + self.factor * (1 - self.step_at))
        peak = 1 + self.amplitude if self.kind is ArrivalKind.DIURNAL else before * max(1.0, self.factor)
        candidates = _renewals(rate * peak, duration_s, random, cv=1.0)
        return [at for at in candidates if random.random() * peak < self.intensity(at, duration_s)]


def _renewals(rate: float, duration_s: float, random: np.random.Generator, *, cv: float) -> list[float]:
    """Gamma-distributed gaps with mean 1/rate."""
    shape = 1 / cv**2
    times: list[float] = []
    at = 0.0
    while True:
        for gap in random.gamma(shape, 1 / (rate * shape), size=max(16, math.ceil(rate * duration_s / 4))):
            at += float(gap)
            if at >= duration_s:
                return times
            times.append(at)
