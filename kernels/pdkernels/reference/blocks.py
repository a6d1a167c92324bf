"""Gather and scatter of KV blocks in torch."""

from __future__ import annotations

from torch import Tensor


def gather_blocks(pool: Tensor, block_ids_M: Tensor, layers: range, heads: range) -> Tensor:
    return pool[block_ids_M.long(), layers.start : layers.stop, :, heads.start : heads.stop].contiguous()


def scatter_blocks(packed: Tensor, pool: Tensor, block_ids_M: Tensor, layers: range, heads: range) -> None:
    pool[block_ids_M.long(), layers.start : layers.stop, :, heads.start : heads.stop] = packed
