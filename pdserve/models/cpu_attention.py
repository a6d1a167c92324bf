"""Attention over a paged pool on a CPU: what is prepared once per step, and the products per layer.

The pool [N, L, 2, K, B, D] is seen as rows in two ways: one row per token of a head (for writes) and one row
per head of a block, B * D numbers (for gathers). Both indices of layer l are those of layer 0 plus a
constant, so the plan holds them for all layers at once.

Shape legend: T tokens of the step, R decode rows, H query heads, K kv heads, G = H / K, D head_dim, N blocks,
L layers, B tokens of a block, P context tokens (padded to blocks), M blocks of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.models.ops import SliceMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGeometry:
    num_layers: int
    num_kv_heads: int
    block_tokens: int
    head_dim: int

    @property
    def heads_per_layer(self) -> int:
        """Head rows of one layer of one block: K then V."""
        return 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextGroup:
    """Slices that are attended together: all decode rows of similar context, or one prefill chunk."""

    rows: slice | Tensor
    """Which of the T rows: a run, or int64 indices."""
    num_sequences: int
    num_new: int
    """New tokens per sequence, alike in a group."""
    gather_L: tuple[Tensor, ...]
    """Per layer, int64 [2 * sequences * K * M]: head rows of the pool, K of all then V of all."""
    mask: Tensor | None
    """Additive float32 [sequences, 1, new or 1, P]; None: every gathered token up to P is seen causally."""
    num_context: int
    """Context tokens when there is no mask: P is cut to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan:
    cos_T1D: Tensor
    sin_T1D: Tensor
    write_L: tuple[Tensor, ...]
    """Per layer, int64 [T * 2K]: token rows of the pool, in the order of k then v of each token."""
    groups: tuple[ContextGroup, ...]


def context_bounds(meta: SliceMeta, block_tokens: int, window: int | None) -> tuple[int, int]:
    """First and last (exclusive) block of the table that the slice can see."""
    end = meta.start + meta.length
    first = 0 if window is None else max(0, meta.start - window + 1) // block_tokens
    return first, -(-end // block_tokens)


def write_rows(slices: Sequence[SliceMeta], geometry: PoolGeometry) -> tuple[Tensor, ...]:
    """Token rows of the pool for k and v of every new token, per layer."""
    g = geometry
    starts: list[Tensor] = []
    for meta in slices:
        position = torch.arange(meta.start, meta.start + meta.length)
        table = torch.tensor(meta.blocks, dtype=torch.int64)
        block = table[position // g.block_tokens]
        starts.append(block * (g.num_layers * g.heads_per_layer * g.block_tokens) + position % g.block_tokens)
    per_token = torch.cat(starts)
    head = torch.arange(g.heads_per_layer) * g.block_tokens
    base = (per_token[:, None] + head).flatten()
    return _per_layer(base, g.num_layers, g.heads_per_layer * g.block_tokens)


def gather_rows(tables_RM: Tensor, geometry: PoolGeometry) -> tuple[Tensor, ...]:
    """Head rows of the pool, per layer: [2, R, K, M] flattened."""
    g = geometry
    block = tables_RM * (g.num_layers * g.heads_per_layer)
    head = torch.arange(g.heads_per_layer).view(2, 1, g.num_kv_heads, 1)
    return _per_layer((block[None, :, None, :] + head).flatten(), g.num_layers, g.heads_per_layer)


def _per_layer(base: Tensor, num_layers: int, stride: int) -> tuple[Tensor, ...]:
    return (base + torch.arange(num_layers)[:, None] * stride).unbind(0)


def decode_groups(
    slices: Sequence[SliceMeta], geometry: PoolGeometry, window: int | None
) -> list[ContextGroup]:
    """Decode rows, in groups whose contexts have about the same number of blocks (within a factor of two)."""
    by_size: dict[int, list[tuple[SliceMeta, int, int]]] = {}
    for meta in slices:
        first, last = context_bounds(meta, geometry.block_tokens, window)
        by_size.setdefault((last - first - 1).bit_length(), []).append((meta, first, last))
    return [_decode_group(members, geometry, window) for members in by_size.values()]


def _decode_group(
    members: list[tuple[SliceMeta, int, int]], geometry: PoolGeometry, window: int | None
) -> ContextGroup:
    blocks = max(last - first for _, first, last in members)
    # Padding repeats a block of the same sequence; the mask hides it.
    tables = [
        (meta.blocks[first:last] + [meta.blocks[first]] * blocks)[:blocks] for meta, first, last in members
    ]
    begin = torch.tensor([first * geometry.block_tokens for _, first, _ in members])
    query = torch.tensor([meta.start for meta, _, _ in members])
    position = begin[:, None] + torch.arange(blocks * geometry.block_tokens)
    hidden = position > query[:, None]
    if window is not None:
        hidden |= position <= (query - window)[:, None]
    rows = [meta.offset for meta, _, _ in members]
    run = rows == list(range(rows[0], rows[0] + len(rows)))
    return ContextGroup(
        rows=slice(rows[0], rows[0] + len(rows)) if run else torch.tensor(rows),
        num_sequences=len(members),
        num_new=1,
        gather_L=gather_rows(torch.tensor(tables, dtype=torch.int64), geometry),
        mask=torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None, :],
        num_context=blocks * geometry.block_tokens,
    )


def prefill_group(meta: SliceMeta, geometry: PoolGeometry, window: int | None) -> ContextGroup:
    """One chunk of a prompt."""
    first, last = context_bounds(meta, geometry.block_tokens, window)
    end = meta.start + meta.length
    context = end - first * geometry.block_tokens
    query = torch.arange(meta.start, end)[:, None]
    position = torch.arange(first * geometry.block_tokens, end)
    mask = None
    if meta.start > 0 or (window is not None and end > window):
        hidden = position > query
        if window is not None:
            hidden |= position <= query - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[None, None]
    return ContextGroup(
        rows=slice(meta.offset, meta.offset + meta.length),
        num_sequences=1,
        num_new=meta.length,
        gather_L=gather_rows(torch.tensor([meta.blocks[first:last]], dtype=torch.int64), geometry),
        mask=mask,
        num_context=context,
    )


def attend(q_THD: Tensor, pool_rows: Tensor, group: ContextGroup, layer: int, num_kv_heads: int) -> Tensor:
    """Attention of one group; returns [sequences * new, H, D] in row order of the group."""
    head_dim = q_THD.shape[-1]
    kv = pool_rows.index_select(0, group.gather_L[layer]).float()
    kv_2RKPD = kv.view(2, group.num_sequences, num_kv_heads, -1, head_dim)[..., : group.num_context, :]
    q = q_THD[group.rows]
    if group.num_new == 1:
        q_RKGD = q.view(group.num_sequences, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(q_RKGD, kv_2RKPD[0], kv_2RKPD[1], attn_mask=group.mask)
        return out.reshape(group.num_sequences, -1, head_dim)
    # One sequence: its kv heads stand where a batch stands, the G query heads of each share them unrepeated.
    q_KGTD = q.view(group.num_new, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (kv_2RKPD[i, 0].unsqueeze(1).expand(-1, q_KGTD.shape[1], -1, -1) for i in (0, 1))
    out = F.scaled_dot_product_attention(q_KGTD, k, v, attn_mask=group.mask, is_causal=group.mask is None)
    return out.permute(2, 0, 1, 3).reshape(group.num_new, -1, head_dim)
