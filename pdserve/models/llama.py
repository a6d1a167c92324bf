"""Decoders of the Llama family: Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM2.

They differ in what `ModelConfig` says: rope scaling, a sliding window, biases, norms of q and k, tied
embeddings. The forward pass is a loop over layers that tells its caller which layers' KV is in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.models.config import ModelConfig
from pdserve.models.layers import DecoderLayer
from pdserve.models.ops import LayerStack, Linear, ModelOps, SliceMeta
from pdserve.models.tensor_parallel import SharedVocabulary

OnLayersDone = Callable[[int, int], None]
"""Called with (first, last_exclusive) when those layers' KV of the step can be read by a transfer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaModel:
    """Weights and ops of one model; immutable, holds no state of a step."""

    config: ModelConfig
    ops: ModelOps
    embedding_VE: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm_E: Tensor
    head: Linear
    stack: LayerStack | None = None
    """Computes runs of the layers in one call, where the ops have that."""
    vocabulary: SharedVocabulary | None = None
    """Where several ranks compute the model: embedding and head are this rank's part."""

    def forward(
        self,
        tokens_T: Tensor,
        slices: Sequence[SliceMeta],
        rows_R: Tensor | None,
        *,
        layer_groups: int,
        on_layers_done: OnLayersDone | None,
    ) -> Tensor:
        """Run the step; returns logits float32 [R, vocab] of the rows asked for (None: of every row).

        tokens_T: int64 on the model's device. Rows may be empty: then the head is not computed.
        """
        plan = self.ops.plan(slices)
        return self.compute(tokens_T, plan, rows_R, layer_groups=layer_groups, on_layers_done=on_layers_done)

    def compute(
        self,
        tokens_T: Tensor,
        plan: Any,
        rows_R: Tensor | None,
        *,
        layer_groups: int = 1,
        on_layers_done: OnLayersDone | None = None,
    ) -> Tensor:
        """`forward` of a step whose plan is made already: launches alone, so that a graph can record it.

        tokens_T may be int32.
        """
        residual = self._embed(tokens_T)
        ends = group_ends(len(self.layers), layer_groups) if on_layers_done is not None else ()
        if self.stack is not None:
            return self._in_runs(self.stack, residual, plan, rows_R, ends, on_layers_done)
        x, first = None, 0
        for layer in self.layers:
            last = layer.index + 1
            keep = rows_R if last == len(self.layers) else None
            x, residual = layer.forward(x, residual, self.ops, self.config, plan, keep)
            if on_layers_done is not None and last in ends:
                self._layers_done()
                on_layers_done(first, last)
                first = last
        if x is None or x.shape[0] == 0:
            self._layers_done()
            return torch.empty((0, self.config.vocab_size), device=tokens_T.device)
        final = self.ops.add_rms_norm(x, residual, self.final_norm_E, self.config.rms_norm_eps)
        return self.head(final).float()

    def _embed(self, tokens_T: Tensor) -> Tensor:
        dtype = self.ops.activation_dtype
        if self.vocabulary is not None:
            return self.vocabulary.embed(tokens_T, self.embedding_VE, dtype)
        return F.embedding(tokens_T, self.embedding_VE).to(dtype)

    def _layers_done(self) -> None:
        """Return when the KV of all layers issued so far is in the pools of every rank."""
        self.ops.layers_done()
        if self.vocabulary is not None:
            self.vocabulary.ranks.barrier()

    def _in_runs(
        self,
        stack: LayerStack,
        residual: Tensor,
        plan: Any,
        rows_R: Tensor | None,
        ends: Sequence[int],
        on_layers_done: OnLayersDone | None,
    ) -> Tensor:
        first = 0
        for last in ends or (len(self.layers),):
            residual = stack.layers(first, last, residual, plan, rows_R if last == len(self.layers) else None)
            if on_layers_done is not None:
                self.ops.layers_done()
                on_layers_done(first, last)
            first = last
        return stack.logits(residual)


def group_ends(num_layers: int, groups: int) -> tuple[int, ...]:
    """Where each of about `groups` runs of layers ends (exclusive), as even as can be."""
    groups = max(1, min(groups, num_layers))
    return tuple(num_layers * (i + 1) // groups for i in range(groups))
