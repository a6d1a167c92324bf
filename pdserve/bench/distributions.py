"""Lengths of prompts and answers, and numbers of turns."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """What a scenario file is made of: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LengthKind(StrEnum):
    FIXED = "fixed"
    UNIFORM = "uniform"
    LOGNORMAL = "lognormal"


class Lengths(Frozen):
    """A distribution of whole numbers in [min, max]. What falls outside is clipped."""

    kind: LengthKind = LengthKind.FIXED
    value: int = Field(default=128, ge=1)
    """fixed: the length; lognormal: the median."""
    sigma: float = Field(default=0.5, ge=0, le=4)
    """lognormal: standard deviation of the logarithm."""
    min: int = Field(default=1, ge=1)
    max: int = Field(default=1_000_000, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def draw(self, random: np.random.Generator) -> int:
        match self.kind:
            case LengthKind.FIXED:
                length = self.value
            case LengthKind.UNIFORM:
                length = int(random.integers(self.min, self.max, endpoint=True))
            case LengthKind.LOGNORMAL:
                length = round(self.value * math.exp(self.sigma * random.standard_normal()))
        return min(max(length, self.min), self.max)
