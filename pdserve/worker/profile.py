"""How fast a worker is, measured once before it takes requests: a few prompts and a few decode steps.

They warm the engine up too: what only the first step of a kind pays (memory that is touched, kernels that are
compiled) is not left for the first request. Their KV goes into blocks that nobody holds yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pdserve.core.ids import BlockId
from pdserve.core.layout import blocks_for
from pdserve.core.sampling import SamplingParams
from pdserve.core.worker_state import ProfileStep
from pdserve.engine.batch import Logits, SampleRequest, SequenceSlice
from pdserve.worker.compute import Work, compute
from pdserve.worker.ports import EnginePort

_PROMPTS: Final = (128, 32, 256, 512)
"""Tokens; the most telling first, where there is time for one alone."""
_FIRST: Final = 32
"""Of the prompt that warms up."""
_BATCHES: Final = (1, 2, 4, 8)
"""Sequences of a decode step."""
_CONTEXT: Final = 32
"""Tokens before the one that a decode step adds."""
_DECODE_SHARE: Final = 0.35
"""Of the time, kept for decode steps."""


def measure(
    engine: EnginePort,
    budget_s: float,
    *,
    max_tokens: int,
    max_seqs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[ProfileStep]:
    """Steps with what each took, as many as `budget_s` seconds allow; the first of each kind is not told.

    max_tokens: of one step. max_seqs: of a decode step. Takes longer than its budget by one step at most,
    which is predicted to fit.
    """
    started, steps = clock(), list[ProfileStep]()

    def timed(works: list[Work]) -> float:
        before = clock()
        compute(engine, works)
        return clock() - before

    def left_s(share: float) -> float:
        return share * budget_s - (clock() - started)

    longest = min(max_tokens, engine.runner.max_model_len - 1, engine.num_blocks * engine.block_tokens)
    first = min(_FIRST, longest)
    per_token_s = timed([_prompt(engine, first)]) / first
    for tokens in 2 * tuple(dict.fromkeys(min(tokens, longest) for tokens in _PROMPTS)):
        if tokens * per_token_s > left_s(1 - _DECODE_SHARE):
            break
        seconds = timed([_prompt(engine, tokens)])
        per_token_s = seconds / tokens
        steps.append(ProfileStep(prompt_tokens=tokens, sequences=0, context_tokens=0, seconds=seconds))
    context = min(_CONTEXT, longest - 1)
    each = blocks_for(context + 1, engine.block_tokens)
    most = min(max_seqs, engine.num_blocks // each)
    step_s = timed(_answers(engine, 1, context)) if left_s(1.0) > 0 else budget_s
    for sequences in _BATCHES + _BATCHES:
        if sequences > most:
            continue
        # A step of twice the sequences takes at most twice as long.
        if 2 * step_s > left_s(1.0):
            break
        step_s = timed(_answers(engine, sequences, context))
        steps.append(
            ProfileStep(
                prompt_tokens=0, sequences=sequences, context_tokens=sequences * context, seconds=step_s
            )
        )
    return steps


def _prompt(engine: EnginePort, tokens: int) -> Work:
    ids = [token % engine.sampler.vocab_size for token in range(1, tokens + 1)]
    blocks = [BlockId(block) for block in range(blocks_for(tokens, engine.block_tokens))]
    return Work(SequenceSlice(tokens=ids, start=0, blocks=blocks, logits=Logits.LAST), _drawn(ids))


def _answers(engine: EnginePort, sequences: int, context: int) -> list[Work]:
    each = blocks_for(context + 1, engine.block_tokens)
    works = []
    for index in range(sequences):
        blocks = [BlockId(block) for block in range(index * each, (index + 1) * each)]
        slice = SequenceSlice(tokens=[1], start=context, blocks=blocks, logits=Logits.LAST)
        works.append(Work(slice, _drawn([1] * (context + 1))))
    return works


def _drawn(tokens: list[int]) -> SampleRequest:
    return SampleRequest(
        params=SamplingParams(temperature=0.0), tokens=tokens, num_prompt_tokens=len(tokens), eos_token_ids=()
    )
