"""Speculative decoding: as the configuration has it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from pdserve.core.settings import Frozen, PositiveInt, off


class SpeculativeMethod(StrEnum):
    """Who guesses tokens that a step then checks."""

    OFF = "off"
    NGRAM = "ngram"
    DRAFT_MODEL = "draft_model"


class SpeculativeSettings(Frozen):
    method: Annotated[SpeculativeMethod, BeforeValidator(off)] = SpeculativeMethod.OFF
    """Decode workers check several guessed tokens in one step; the answers are those that they would give
    without. ngram: what followed the same words earlier in prompt or answer. draft_model: a small model."""
    num_speculative_tokens: PositiveInt = 5
    """Guesses at one answer in one step at most."""
    prompt_lookup_min: PositiveInt = 2
    """ngram: the shortest run of tokens that must have occurred before."""
    prompt_lookup_max: PositiveInt = 5
    """ngram: the longest that is looked for."""
    model: str | None = None
    """draft_model: as `model.model`; must have the same vocabulary."""
    memory_gib: Annotated[float, Field(gt=0)] = 0.5
    """draft_model: its KV pool; a sequence that finds no room there is not guessed at."""
    adaptive: bool = True
    """Guess only where it pays, by the measured share of guesses that hold and the measured time of steps:
    not at answers that are hard to guess, and not in large batches. false: always."""

    @model_validator(mode="after")
    def _consistent(self) -> SpeculativeSettings:
        if self.method is SpeculativeMethod.DRAFT_MODEL and self.model is None:
            raise ValueError("method draft_model needs a model")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("prompt_lookup_min is greater than prompt_lookup_max")
        return self
