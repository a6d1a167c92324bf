"""One step on the engine: forward over all slices, then one call of the sampler for all rows.

Shape legend: N rows of logits, V vocabulary, L rows of one slice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import Logits, SampleRequest, SampleResult, SequenceSlice
from pdserve.worker.ports import EnginePort, OnLayersDone

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Wanted for each of `next_tokens`, given the slice's tokens before it: the `count` best alternatives."""

    next_tokens: list[int]
    count: int


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of a step. `sample`: draw a token from the slice's last row.

    drafts: guesses that the slice's tokens end with. The row before them and each of theirs is sampled, as if
    those before it were the sequence's; the slice asks for all of its rows.
    """

    slice: SequenceSlice
    sample: SampleRequest | None
    prompt_logprobs: PromptLogprobs | None = None
    drafts: Sequence[int] = ()

    @property
    def num_rows(self) -> int:
        match self.slice.logits:
            case Logits.NONE:
                return 0
            case Logits.LAST:
                return 1
            case Logits.ALL:
                return len(self.slice.tokens)


@dataclass(frozen=True, slots=True)
class WorkResult:
    sampled: SampleResult | None
    prompt_logprobs: list[TokenLogprobs]
    after_drafts: Sequence[SampleResult] = ()
    """What was sampled after each draft."""


def compute(
    engine: EnginePort,
    works: Sequence[Work],
    *,
    layer_groups: int = 1,
    on_layers_done: OnLayersDone | None = None,
) -> list[WorkResult]:
    """Results in the order of `works`. Raises whatever the engine raises."""
    logits_NV = engine.runner.forward(
        [work.slice for work in works], layer_groups=layer_groups, on_layers_done=on_layers_done
    )
    wanted: list[SampleRequest] = []
    sampled_rows: list[int] = []
    prompt_logprobs: list[list[TokenLogprobs]] = []
    row = 0
    for work in works:
        prompt_logprobs.append(_prompt_logprobs(engine, work, logits_NV[row : row + work.num_rows]))
        row += work.num_rows
        if work.sample is not None:
            wanted += _sample_requests(work.sample, work.drafts)
            sampled_rows += range(row - 1 - len(work.drafts), row)
    if len(sampled_rows) < row:  # else every row is sampled, as in a decode step: no copy
        logits_NV = logits_NV[sampled_rows]
    sampled = iter(engine.sampler.sample(logits_NV, wanted) if wanted else [])
    return [
        WorkResult(
            None if work.sample is None else next(sampled), logprobs, [next(sampled) for _ in work.drafts]
        )
        for work, logprobs in zip(works, prompt_logprobs, strict=True)
    ]


def _sample_requests(first: SampleRequest, drafts: Sequence[int]) -> Iterator[SampleRequest]:
    yield first
    tokens = first.tokens
    for draft in drafts:
        tokens = [*tokens, draft]
        yield replace(first, tokens=tokens)


def slice_logits(*, final: bool, prompt_logprobs: int | None) -> Logits:
    """Rows that a chunk of a prompt needs."""
    if prompt_logprobs is not None:
        return Logits.ALL
    return Logits.LAST if final else Logits.NONE


def _prompt_logprobs(engine: EnginePort, work: Work, rows_LV: Tensor) -> list[TokenLogprobs]:
    wanted = work.prompt_logprobs
    if wanted is None or not wanted.next_tokens:
        return []
    count = len(wanted.next_tokens)
    return engine.sampler.prompt_logprobs(rows_LV[:count], wanted.next_tokens, wanted.count)
