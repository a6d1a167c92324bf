"""One forward pass of the model over slices of sequences, through the paged pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdserve.core.errors import InvariantViolated
from pdserve.core.layout import GroupLayout
from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.engine.decode_graphs import DecodeGraphs
from pdserve.engine.kv_pool import KVPool
from pdserve.models.config import ModelConfig
from pdserve.models.llama import LlamaModel
from pdserve.models.ops import SliceMeta


class ModelRunner:
    """Runs steps, one at a time, on the thread that calls `forward`.

    Nothing is kept between steps but the pool; which blocks belong to whom is the caller's business.
    """

    def __init__(
        self,
        model: LlamaModel,
        pools: tuple[KVPool, ...],
        *,
        max_model_len: int,
        model_digest: str,
        device: torch.device,
    ) -> None:
        self._model = model
        self.pools = pools
        self.max_model_len = max_model_len
        self.model_digest = model_digest
        self.device = device
        self._graphs: DecodeGraphs | None = None
        model.ops.bind_pool(pools[0].tensor)

    def use_graphs(self, graphs: DecodeGraphs) -> None:
        """Replay recorded decode steps where one suits; `graphs` are captured already, over this pool."""
        self._graphs = graphs

    @property
    def model(self) -> LlamaModel:
        return self._model

    @property
    def config(self) -> ModelConfig:
        return self._model.config

    @property
    def layouts(self) -> tuple[GroupLayout, ...]:
        return tuple(pool.layout for pool in self.pools)

    @torch.inference_mode()
    def forward(
        self,
        slices: Sequence[SequenceSlice],
        *,
        layer_groups: int = 1,
        on_layers_done: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Compute the slices' tokens, write their KV, and return logits.

        Returns float32 [rows, vocab] on the runner's device, rows in slice order: none for `Logits.NONE`, one
        for LAST, len(tokens) for ALL; valid until the next step, whose graph may write there.
        `on_layers_done(first, last_exclusive)` is called about `layer_groups` times, each when the KV of
        those layers of this step may be read by a transfer. Raises `InvariantViolated`, before anything is
        written, for a slice that its blocks, the context or the vocabulary cannot hold.
        """
        metas = self._metas(slices)
        if self._graphs is not None and on_layers_done is None:
            size = self._graphs.rows_for(slices)
            if size is not None:
                return self._graphs.forward(size, [s.tokens[0] for s in slices], metas)
        tokens = torch.tensor([token for s in slices for token in s.tokens], dtype=torch.int64)
        rows = _logit_rows(slices)
        return self._model.forward(
            tokens.to(self.device, non_blocking=True),
            metas,
            None
            if rows is None
            else torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True),
            layer_groups=layer_groups,
            on_layers_done=on_layers_done,
        )

    def _metas(self, slices: Sequence[SequenceSlice]) -> list[SliceMeta]:
        metas, offset = [], 0
        block_tokens, num_blocks = self.pools[0].layout.block_tokens, self.pools[0].num_blocks
        for s in slices:
            end = s.start + len(s.tokens)
            if not s.tokens or s.start < 0 or end > len(s.blocks) * block_tokens or end > self.max_model_len:
                raise InvariantViolated(
                    f"slice of {len(s.tokens)} tokens at {s.start} with {len(s.blocks)} blocks of "
                    f"{block_tokens} tokens, context {self.max_model_len}"
                )
            if min(s.blocks) < 0 or max(s.blocks) >= num_blocks:
                raise InvariantViolated(f"blocks {min(s.blocks)}..{max(s.blocks)} in a pool of {num_blocks}")
            if min(s.tokens) < 0 or max(s.tokens) >= self.config.vocab_size:
                raise InvariantViolated(f"token {max(s.tokens)} in a vocabulary of {self.config.vocab_size}")
            metas.append(SliceMeta(offset=offset, length=len(s.tokens), start=s.start, blocks=s.blocks))
            offset += len(s.tokens)
        if not metas:
            raise InvariantViolated("a step needs at least one slice")
        return metas


def _logit_rows(slices: Sequence[SequenceSlice]) -> list[int] | None:
    """Rows of the step that get logits; None when all do."""
    rows: list[int] = []
    offset = 0
    for s in slices:
        end = offset + len(s.tokens)
        match s.logits:
            case Logits.NONE:
                pass
            case Logits.LAST:
                rows.append(end - 1)
            case Logits.ALL:
                rows.extend(range(offset, end))
        offset = end
    return None if len(rows) == offset else rows
