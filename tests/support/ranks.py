"""Ranks of a tensor-parallel model as threads of one process, meeting in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from pdserve.core.config import CacheSettings, DType, ModelSettings
from pdserve.core.ids import BlockId
from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.engine.build import Engine, build_engine
from pdserve.engine.ranks import GlooRanks, meeting_place

T = TypeVar("T")
TIMEOUT_S = 60.0


def on_every_rank(size: int, act: Callable[[GlooRanks], T]) -> list[T]:
    """What `act` returned on each rank, in order; raises what it raised on the first that failed."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as threads:
        made = [
            threads.submit(lambda rank=rank: act(GlooRanks("worker", store, rank, size, TIMEOUT_S)))
            for rank in range(size)
        ]
        return [future.result() for future in made]


def engine_of(
    ranks: GlooRanks | None,
    path: Path,
    dtype: DType = DType.FLOAT32,
    *,
    block: int = 8,
    blocks: int = 64,
    load_format: str = "auto",
) -> Engine:
    """A rank's part of an engine; all ranks make theirs at the same time."""
    return build_engine(
        path,
        ModelSettings.model_validate({"dtype": dtype, "load_format": load_format}),
        CacheSettings(block_size=block, num_blocks=blocks),
        device="cpu",
        num_threads=None,
        ranks=ranks,
    )


def steps_of(tokens: list[int], num_blocks: int, *, prompt: int, block: int = 8) -> list[SequenceSlice]:
    """One sequence: its prompt in two chunks, the first of them once without logits, as in the middle of a
    longer one; then token by token. Its blocks are every third of the pool's, backwards."""
    blocks = [BlockId(i) for i in range(num_blocks - 1, 0, -3)][: -(-len(tokens) // block)]
    ends = [block + 1, prompt, *range(prompt + 1, len(tokens) + 1)]
    slices = [
        SequenceSlice(tokens=tokens[start:end], start=start, blocks=blocks, logits=Logits.ALL)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return [replace(slices[0], logits=Logits.NONE), *slices]


def run_steps(engine: Engine, steps: list[SequenceSlice]) -> torch.Tensor:
    """Their logits, each step told of in two groups of layers."""
    rows = []
    for one in steps:
        done: list[tuple[int, int]] = []
        rows.append(
            engine.runner.forward(
                [one], layer_groups=2, on_layers_done=lambda *layers, done=done: done.append(layers)
            )
        )
        assert len(done) == 2
    return torch.cat([row for row in rows if row.shape[0]])


def run_rank(rank: int, size: int, model: Path, meeting: Path, steps: list[SequenceSlice], out: Path) -> None:
    """A rank that is a process: computes the steps; rank 0 saves the logits."""
    torch.set_num_threads(1)
    ranks = GlooRanks("worker", meeting_place(meeting, size), rank, size, TIMEOUT_S)
    logits = run_steps(engine_of(ranks, model), steps)
    if rank == 0:
        torch.save(logits, out)
