"""What one forward pass computes, as plain data.

A step is a list of slices: for each sequence, some new tokens after what is already in its blocks. Prefill
chunks and decode steps are the same thing with different lengths, and may share a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pdserve.core.errors import PdServeError
from pdserve.core.ids import BlockId
from pdserve.core.sampling import SamplingParams, TokenLogprobs


class Logits(Enum):
    """Which rows of a slice the head is computed for."""

    NONE = "none"
    """A chunk in the middle of a prompt."""
    LAST = "last"
    ALL = "all"
    """Prompt logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """New tokens at positions [start, start + len(tokens)) of one sequence.

    `blocks` is the sequence's block table in order; it covers at least start + len(tokens) tokens, and the
    KV of positions [0, start) is in it already.
    """

    tokens: list[int]
    start: int
    blocks: list[BlockId]
    logits: Logits = Logits.LAST


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One row to sample. `tokens` is prompt + output so far; the sampled token gets position len(tokens)."""

    params: SamplingParams
    tokens: list[int]
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...]
    """Not sampled before min_tokens."""


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class SampleFailed:
    """This row has no next token (its logits are not numbers, or every token is masked).

    Its request ends with `error`; the other rows of the batch are sound.
    """

    error: PdServeError


SampleResult = Sampled | SampleFailed
