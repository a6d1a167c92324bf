"""Which bytes of which blocks a push moves: pure arithmetic that sender, receiver and backends share.

A worker's pool is a *shard*: of every token of its blocks it holds `num_kv_heads` of the model's heads.

    tensor-parallel size 2, 4 heads            size 4                      size 8: heads are replicated
    rank 0: heads 0 1   rank 1: heads 2 3      ranks 0..3: heads 0 1 2 3   ranks 0..7: 0 0 1 1 2 2 3 3

A *route* leads from one shard to another: the heads they share, in *grains* of as many tokens as fit both
block sizes. The bytes of a push are counted in one order on both sides: grain, layer, K/V, head, token.
Between shards of one shape a grain is a whole block with all its heads: that is the order in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtransfer.protocol import Push
from pdserve.core.errors import TransferError
from pdserve.core.ids import BlockId
from pdserve.core.layout import Fingerprint, GroupLayout, Shard, blocks_for

Units = npt.NDArray[np.int64]
Span = tuple[int, int, int]
"""Source offset, destination offset, length; bytes from the start of each pool."""
Piece = tuple[int, int]
"""Offset and length in one pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Some heads of some tokens in one pool; blocks in the order of their tokens."""

    layout: GroupLayout
    blocks: tuple[int, ...]
    first_token: int
    """Where in `blocks[0]` it begins; a multiple of `grain_tokens`."""
    num_grains: int
    grain_tokens: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    """Of those in this pool."""

    @property
    def size_bytes(self) -> int:
        first, last = self.layers
        num_heads = self.heads[1] - self.heads[0]
        grains = self.num_grains * (last - first) * 2 * num_heads
        return grains * grain_bytes(self.layout, self.grain_tokens)

    def require(self) -> None:
        """Raise `ValueError` unless it lies within its blocks and these within the layout's geometry."""
        group, (first, last), (low, high) = self.layout.group, self.layers, self.heads
        size, grain = self.layout.block_tokens, self.grain_tokens
        if not 0 <= first < last <= group.num_layers or not 0 <= low < high <= group.num_kv_heads:
            raise ValueError(f"layers {self.layers} and heads {self.heads} of {group}")
        if grain <= 0 or size % grain or self.first_token % grain or not 0 <= self.first_token < size:
            raise ValueError(f"grains of {grain} tokens from {self.first_token} in blocks of {size}")
        tokens = self.first_token + self.num_grains * grain
        if self.num_grains <= 0 or len(self.blocks) != blocks_for(tokens, size):
            raise ValueError(f"{len(self.blocks)} blocks of {size} for {tokens} tokens")

    def units(self, *, by_layer: bool) -> Units:
        """Indices of its units, in the order of the bytes, in a pool cut into layers of blocks or into heads
        of grains. By layer only what is whole: all heads of whole blocks."""
        layout, layers = self.layout, np.arange(*self.layers)
        blocks = np.asarray(self.blocks, dtype=np.int64)
        if by_layer:
            units: Units = blocks[:, None] * layout.group.num_layers + layers
            return units.ravel()
        per_block = layout.block_tokens // self.grain_tokens
        grains = self.first_token // self.grain_tokens + np.arange(self.num_grains)
        # [grain, layer, K/V, head]
        rows = blocks[grains // per_block][:, None] * layout.group.num_layers + layers
        rows = (rows[:, :, None] * 2 + np.arange(2))[:, :, :, None] * layout.group.num_kv_heads
        units = (rows + np.arange(*self.heads)) * per_block + (grains % per_block)[:, None, None, None]
        return units.ravel()

    def pieces(self) -> list[Piece]:
        """Its contiguous bytes, in order, neighbours merged."""
        layout = self.layout
        whole = self.grain_tokens == layout.block_tokens and self.heads == (0, layout.group.num_kv_heads)
        size = layout.layer_bytes if whole else grain_bytes(layout, self.grain_tokens)
        units = self.units(by_layer=whole)
        starts = np.flatnonzero(np.diff(units, prepend=units[0] - 2) != 1)
        lengths = np.diff(starts, append=len(units))
        return [(int(first) * size, int(n) * size) for first, n in zip(units[starts], lengths, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How blocks of one shard become blocks of another."""

    src: GroupLayout
    dst: GroupLayout
    src_heads: tuple[int, int]
    dst_heads: tuple[int, int]
    grain_tokens: int

    @property
    def num_heads(self) -> int:
        return self.src_heads[1] - self.src_heads[0]

    @property
    def by_layer(self) -> bool:
        """Both shards have one shape: then layers of blocks are the units, not heads of grains."""
        every = (0, self.src.group.num_kv_heads)
        return self.src == self.dst and self.src_heads == self.dst_heads == every

    @property
    def unit_bytes(self) -> int:
        return self.src.layer_bytes if self.by_layer else grain_bytes(self.src, self.grain_tokens)

    def num_tokens(self, push: Push) -> int:
        """Tokens that a push moves, rounded up to grains: what is beyond in its last block goes along."""
        found = push.num_tokens
        if found is None:
            found = len(push.src_blocks) * self.src.block_tokens - push.src_token
        return blocks_for(found, self.grain_tokens) * self.grain_tokens

    def size_bytes(self, push: Push) -> int:
        return self.num_tokens(push) * self._token_bytes(push)

    def _token_bytes(self, push: Push) -> int:
        first, last = push.layers
        return (last - first) * 2 * self.num_heads * self.src.group.token_head_bytes

    def source(self, push: Push) -> Selection:
        return self._selection(push, self.src, push.src_blocks, push.src_token, self.src_heads)

    def destination(self, push: Push) -> Selection:
        return self._selection(push, self.dst, push.dst_blocks, push.dst_token, self.dst_heads)

    def _selection(
        self, push: Push, layout: GroupLayout, blocks: Sequence[int], token: int, heads: tuple[int, int]
    ) -> Selection:
        return Selection(
            layout=layout,
            blocks=tuple(blocks),
            first_token=token,
            num_grains=self.num_tokens(push) // self.grain_tokens,
            grain_tokens=self.grain_tokens,
            layers=push.layers,
            heads=heads,
        )

    def units(self, push: Push) -> tuple[Units, Units]:
        """Units of `unit_bytes` in the source, and those of the destination that they go to."""
        by_layer = self.by_layer
        return self.source(push).units(by_layer=by_layer), self.destination(push).units(by_layer=by_layer)

    def spans(self, push: Push) -> list[Span]:
        """The contiguous pieces of a push, with neighbours on both sides merged."""
        src, dst = self.units(push)
        size = self.unit_bytes
        breaks = (np.diff(src, prepend=src[0] - 2) != 1) | (np.diff(dst, prepend=dst[0] - 2) != 1)
        starts = np.flatnonzero(breaks)
        lengths = np.diff(starts, append=len(src))
        return [
            (int(a) * size, int(b) * size, int(n) * size)
            for a, b, n in zip(src[starts], dst[starts], lengths, strict=True)
        ]

    def require(self, push: Push) -> None:
        """Raise `TransferError` unless the blocks on both sides hold exactly the push's tokens."""
        for side, selection in (("source", self.source(push)), ("destination", self.destination(push))):
            try:
                selection.require()
            except ValueError as error:
                raise TransferError(f"push {push.id}: {side}: {error}") from error

    def split(self, push: Push, max_bytes: int) -> Iterator[Push]:
        """The same bytes, in order, as pushes of at most `max_bytes` and at least one block; ids and notes
        are the first's own: the caller gives them out."""
        total, block = self.num_tokens(push), max(self.src.block_tokens, self.dst.block_tokens)
        step = max(max_bytes // (self._token_bytes(push) * block), 1) * block
        if step >= total:
            yield push
            return
        for begin in range(0, total, step):
            count = min(step, total - begin)
            src_blocks, src_token = _part(push.src_blocks, push.src_token + begin, count, self.src)
            dst_blocks, dst_token = _part(push.dst_blocks, push.dst_token + begin, count, self.dst)
            yield dataclasses.replace(
                push,
                src_blocks=src_blocks,
                dst_blocks=dst_blocks,
                src_token=src_token,
                dst_token=dst_token,
                num_tokens=count,
            )


def plan_route(src: Shard, dst: Shard) -> Route | None:
    """The way from one shard to another; None when `src` has nothing for `dst`, or another replica sends it.

    Every head of every destination has exactly one sender. Shards are checked by `Fingerprint`.
    """
    begin = max(src.first_head, dst.first_head)
    end = min(src.first_head + src.num_heads, dst.first_head + dst.num_heads)
    if begin >= end or dst.replica * src.num_replicas // dst.num_replicas != src.replica:
        return None
    return Route(
        src=src.layout,
        dst=dst.layout,
        src_heads=(begin - src.first_head, end - src.first_head),
        dst_heads=(begin - dst.first_head, end - dst.first_head),
        grain_tokens=math.gcd(src.layout.block_tokens, dst.layout.block_tokens),
    )


def plan_routes(ours: Fingerprint, theirs: Fingerprint) -> tuple[Route | None, ...]:
    """The way from this worker's pools to a peer's, one per cache group."""
    return tuple(plan_route(src, dst) for src, dst in zip(ours.shards, theirs.shards, strict=True))


def grain_bytes(layout: GroupLayout, grain_tokens: int) -> int:
    """One head of one grain: the finest piece that is contiguous in every pool."""
    return grain_tokens * layout.group.token_head_bytes


def _part(
    blocks: tuple[BlockId, ...], token: int, count: int, layout: GroupLayout
) -> tuple[tuple[BlockId, ...], int]:
    first = token // layout.block_tokens
    within = token % layout.block_tokens
    return blocks[first : first + blocks_for(within + count, layout.block_tokens)], within
