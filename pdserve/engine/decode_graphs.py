"""Decode steps as CUDA graphs: one per padded batch size, captured at start, replayed as one launch.

A step that no graph suits (a chunk of a prompt, guessed tokens, more sequences than the largest graph, a push
that waits for layers) runs eagerly. What decides that, and what a graph's buffers hold, is plain code;
capture and replay alone need a GPU, and have never run on one.

Shape legend: R rows of a graph, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.models.graph_plan import graph_rows
from pdserve.models.ops import SliceMeta

WARM_UPS = 2
"""Eager runs before a capture: kernels are compiled and library handles made in them."""


class DecodeStep(Protocol):
    """Memory of the index tensors of one graph."""

    def fill(self, tokens: Sequence[int], slices: Sequence[SliceMeta]) -> None:
        """Send the contents of a step; behind them, rows are padding."""
        ...

    def forward(self) -> Tensor:
        """Logits float32 [R, V] of what was sent last, by launches alone."""
        ...


@dataclass(frozen=True, slots=True)
class Captured:
    """A recorded step: `replay` writes `logits_RV` anew."""

    logits_RV: Tensor
    replay: Callable[[], None]


Capture = Callable[[Callable[[], Tensor]], Captured]


class DecodeGraphs:
    """Graphs of a model's decode steps, by rows."""

    def __init__(
        self, make_step: Callable[[int], DecodeStep], sizes: Sequence[int], capture: Capture
    ) -> None:
        self._sizes = tuple(sorted(set(sizes)))
        self._make_step, self._capture = make_step, capture
        self._graphs: dict[int, tuple[DecodeStep, Captured]] = {}

    def capture(self, progress: Callable[[int, int, int], None]) -> None:
        """Record every size, the largest first: its memory serves the others too.

        progress: called with (graphs done, graphs in all, rows of the next).
        """
        for done, rows in enumerate(reversed(self._sizes)):
            progress(done, len(self._sizes), rows)
            step = self._make_step(rows)
            step.fill([], [])
            self._graphs[rows] = step, self._capture(step.forward)

    def rows_for(self, slices: Sequence[SequenceSlice]) -> int | None:
        """Rows of the graph that this step takes; None: it runs eagerly."""
        if any(len(s.tokens) != 1 or s.logits is Logits.NONE for s in slices):
            return None
        rows = graph_rows(len(slices), self._sizes)
        return rows if rows in self._graphs else None

    def forward(self, rows: int, tokens: Sequence[int], slices: Sequence[SliceMeta]) -> Tensor:
        """Logits float32 [len(tokens), V], valid until the next step of this size."""
        step, captured = self._graphs[rows]
        step.fill(tokens, slices)
        captured.replay()
        return captured.logits_RV[: len(tokens)]


def cuda_capture(device: torch.device) -> Capture:
    """Captures that share one memory pool; for a CUDA device."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> Captured:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types there
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits_RV = step()
        return Captured(logits_RV, graph.replay)

    return capture
