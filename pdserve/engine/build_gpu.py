"""What an engine on a GPU has besides: recorded decode steps, and the sampler that draws there.

Imported on hosts with Triton alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.core.layout import blocks_for
from pdserve.engine.decode_graphs import Capture, DecodeGraphs
from pdserve.engine.runner import ModelRunner
from pdserve.models.llama import LlamaModel
from pdserve.models.ops import SliceMeta
from pdserve.models.ops_triton import TritonDecodeStep, TritonOps


class _Step:
    """See `DecodeStep`."""

    def __init__(self, model: LlamaModel, buffers: TritonDecodeStep) -> None:
        self._model, self._buffers = model, buffers

    def fill(self, tokens: Sequence[int], slices: Sequence[SliceMeta]) -> None:
        self._buffers.fill(tokens, slices)

    def forward(self) -> Tensor:
        return self._model.compute(self._buffers.tokens_R, self._buffers.plan, None)


@torch.inference_mode()
def decode_graphs(
    runner: ModelRunner, sizes: Sequence[int], capture: Capture, progress: Callable[[int, int, int], None]
) -> DecodeGraphs:
    """Record decode steps of these batch sizes over the runner's pool. See `DecodeGraphs.capture`."""
    model = runner.model
    if not isinstance(model.ops, TritonOps):
        raise ConfigError(f"decode graphs need the Triton operations, not {type(model.ops).__name__}")
    ops = model.ops
    table_blocks = blocks_for(runner.max_model_len, runner.layouts[0].block_tokens)
    graphs = DecodeGraphs(
        lambda rows: _Step(model, TritonDecodeStep(ops, rows, table_blocks)), sizes, capture
    )
    graphs.capture(progress)
    return graphs
