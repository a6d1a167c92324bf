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
from typing import Final

import torch
from torch import Tensor

from pdserve.models.ops import SliceMeta

TILE_QUERIES: Final = 64
"""Queries of a prefill chunk that are attended together: few enough to skip most keys behind them."""
TILE_SCORES: Final = 2**19
"""Scores (float32) of one product; more would leave the cache."""
GROUP_COST_BYTES: Final = 300_000
"""What a further batch of decode rows costs, as KV bytes read in that time."""
GROUP_KEY_BYTES: Final = 4 * 2**20
"""Float32 keys of one batch of decode rows: they stay in the cache, and malloc does not go to the kernel."""
BFLOAT16_CONTEXT: Final = 1024
"""From this many context tokens in a batch, values are multiplied as bfloat16; below, set-up costs more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGeometry:
    num_layers: int
    num_kv_heads: int
    block_tokens: int
    head_dim: int
    itemsize: int

    @property
    def heads_per_layer(self) -> int:
        """Head rows of one layer of one block: K then V."""
        return 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one new token each, attended in one batch; contexts are padded to whole blocks."""

    rows: slice | Tensor
    """Which of the T rows: a run, or int64 indices."""
    num_sequences: int
    keys_L: tuple[Tensor, ...]
    """Per layer, int64 [R * K * M]: head rows of the pool."""
    values_L: tuple[Tensor, ...]
    mask_R1P: Tensor
    """Additive float32 [R * K, 1, P]: minus infinity for padding and what is out of the window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Queries [begin, end) of a chunk see keys [low, high) of the gathered context."""

    begin: int
    end: int
    low: int
    high: int
    mask_from: int
    mask: Tensor
    """Additive float32 [end - begin, high - mask_from], for keys from `mask_from` on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillGroup:
    """One chunk of one sequence."""

    rows: slice
    keys_L: tuple[Tensor, ...]
    values_L: tuple[Tensor, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan:
    cos_T1D: Tensor
    sin_T1D: Tensor
    write_L: tuple[Tensor, ...]
    """Per layer, int64 [T * 2K]: token rows of the pool, in the order of k then v of each token."""
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillGroup, ...]


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


def gather_rows(tables_RM: Tensor, geometry: PoolGeometry) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Head rows of the pool for keys and for values, each per layer: [R, K, M] flattened."""
    g = geometry
    head = torch.arange(g.num_kv_heads)[:, None]
    base = (tables_RM[:, None, :] * (g.num_layers * g.heads_per_layer) + head).flatten()
    keys = _per_layer(base, g.num_layers, g.heads_per_layer)
    return keys, _per_layer(base + g.num_kv_heads, g.num_layers, g.heads_per_layer)


def _per_layer(base: Tensor, num_layers: int, stride: int) -> tuple[Tensor, ...]:
    return (base + torch.arange(num_layers)[:, None] * stride).unbind(0)


def decode_groups(
    slices: Sequence[SliceMeta], geometry: PoolGeometry, window: int | None
) -> tuple[DecodeGroup, ...]:
    """Batches of decode rows, longest contexts first, each cut where padding would cost more than a batch."""
    members = [(meta, *context_bounds(meta, geometry.block_tokens, window)) for meta in slices]
    members.sort(key=lambda m: m[1] - m[2])
    block_bytes = 2 * geometry.num_kv_heads * geometry.block_tokens * geometry.head_dim * geometry.itemsize
    budget = GROUP_COST_BYTES // block_bytes
    key_bytes = 4 * geometry.num_kv_heads * geometry.block_tokens * geometry.head_dim
    groups: list[list[tuple[SliceMeta, int, int]]] = []
    longest = padding = 0
    for member in members:
        blocks = member[2] - member[1]
        padding += longest - blocks
        full = groups and (len(groups[-1]) + 1) * longest * key_bytes > GROUP_KEY_BYTES
        if not groups or padding > budget or full:
            groups.append([])
            longest, padding = blocks, 0
        groups[-1].append(member)
    return tuple(_decode_group(group, geometry, window) for group in groups)


def _decode_group(
    members: list[tuple[SliceMeta, int, int]], geometry: PoolGeometry, window: int | None
) -> DecodeGroup:
    blocks = max(last - first for _, first, last in members)
    # Padding repeats a block of the same sequence; the mask hides it.
    tables = [
        (meta.blocks[first:last] + [meta.blocks[first]] * blocks)[:blocks] for meta, first, last in members
    ]
    begin = torch.tensor([first * geometry.block_tokens for _, first, _ in members])
    query = torch.tensor([meta.start for meta, _, _ in members])
    position = begin[:, None] + torch.arange(blocks * geometry.block_tokens)
    mask = _hide(position, query[:, None], window)
    rows = [meta.offset for meta, _, _ in members]
    run = rows == list(range(rows[0], rows[0] + len(rows)))
    keys, values = gather_rows(torch.tensor(tables, dtype=torch.int64), geometry)
    return DecodeGroup(
        rows=slice(rows[0], rows[0] + len(rows)) if run else torch.tensor(rows),
        num_sequences=len(members),
        keys_L=keys,
        values_L=values,
        mask_R1P=mask.repeat_interleave(geometry.num_kv_heads, dim=0).unsqueeze(1),
    )


def prefill_group(meta: SliceMeta, geometry: PoolGeometry, window: int | None) -> PrefillGroup:
    """One chunk of a prompt, in tiles of queries that see only the keys before their end."""
    first, last = context_bounds(meta, geometry.block_tokens, window)
    keys, values = gather_rows(torch.tensor([meta.blocks[first:last]], dtype=torch.int64), geometry)
    origin = first * geometry.block_tokens
    tiles = [
        _tile(meta, begin, min(begin + TILE_QUERIES, meta.length), origin, window)
        for begin in range(0, meta.length, TILE_QUERIES)
    ]
    return PrefillGroup(
        rows=slice(meta.offset, meta.offset + meta.length), keys_L=keys, values_L=values, tiles=tuple(tiles)
    )


def _tile(meta: SliceMeta, begin: int, end: int, origin: int, window: int | None) -> Tile:
    low = 0 if window is None else max(0, meta.start + begin - window + 1 - origin)
    high = meta.start + end - origin
    # Without a window only the tile's own keys are ever hidden from it.
    mask_from = low if window is not None else high - (end - begin)
    position = torch.arange(origin + mask_from, origin + high)
    query = torch.arange(meta.start + begin, meta.start + end)[:, None]
    mask = _hide(position, query, window)
    return Tile(begin=begin, end=end, low=low, high=high, mask_from=mask_from, mask=mask)


def _hide(position: Tensor, query: Tensor, window: int | None) -> Tensor:
    """Minus infinity where the query must not look, else zero."""
    hidden = position > query
    if window is not None:
        hidden |= position <= query - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def attend_decode(
    q_RHD: Tensor, head_rows: Tensor, group: DecodeGroup, layer: int, num_kv_heads: int
) -> Tensor:
    """One token per sequence; returns float32 [R, H, D]. Scores are float32 whatever the pool's dtype."""
    sequences, heads, head_dim = q_RHD.shape
    batch = sequences * num_kv_heads
    q = q_RHD.reshape(batch, heads // num_kv_heads, head_dim)
    k = _numbers(head_rows.index_select(0, group.keys_L[layer])).view(batch, -1, head_dim).float()
    v = _numbers(head_rows.index_select(0, group.values_L[layer])).view(batch, -1, head_dim)
    mask = group.mask_R1P.expand(-1, q.shape[1], -1)
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=head_dim**-0.5).softmax(dim=-1)
    if v.dtype != torch.bfloat16 or sequences * v.shape[1] < BFLOAT16_CONTEXT:
        return torch.bmm(weights, v.float()).view(sequences, heads, head_dim)
    return torch.bmm(weights.bfloat16(), v).float().view(sequences, heads, head_dim)


def _numbers(rows: Tensor) -> Tensor:
    """Rows of the pool as numbers; torch gathers FP8 as bytes only."""
    return rows.view(torch.float8_e4m3fn).float() if rows.dtype == torch.uint8 else rows


def attend_prefill(
    q_THD: Tensor, head_rows: Tensor, group: PrefillGroup, layer: int, num_kv_heads: int, out_THD: Tensor
) -> None:
    """One chunk; writes float32 out_THD. Scores are float32, their softmax is bfloat16 where the pool is."""
    length, heads, head_dim = q_THD.shape
    per_kv = heads // num_kv_heads
    k_KPD = _numbers(head_rows.index_select(0, group.keys_L[layer])).view(num_kv_heads, -1, head_dim).float()
    v_KPD = _numbers(head_rows.index_select(0, group.values_L[layer])).view(num_kv_heads, -1, head_dim)
    if v_KPD.dtype == torch.float16:
        v_KPD = v_KPD.float()
    k_KDP = k_KPD.transpose(1, 2)
    q_KGTD = q_THD.view(length, num_kv_heads, per_kv, head_dim).permute(1, 2, 0, 3)
    out_KGTD = out_THD.view(length, num_kv_heads, per_kv, head_dim).permute(1, 2, 0, 3)
    for tile in group.tiles:
        size = tile.end - tile.begin
        at_once = max(1, TILE_SCORES // (per_kv * size * (tile.high - tile.low)))
        for head in range(0, num_kv_heads, at_once):
            some = slice(head, head + at_once)
            q = q_KGTD[some, :, tile.begin : tile.end].reshape(-1, per_kv * size, head_dim) * head_dim**-0.5
            scores = torch.bmm(q, k_KDP[some, :, tile.low : tile.high])
            scores.view(-1, per_kv, size, tile.high - tile.low)[..., tile.mask_from - tile.low :] += tile.mask
            weights = scores.softmax(dim=-1).to(v_KPD.dtype)
            mixed = torch.bmm(weights, v_KPD[some, tile.low : tile.high])
            out_KGTD[some, :, tile.begin : tile.end] = mixed.view(-1, per_kv, size, head_dim)
