"""Where a block's bytes are: geometry of the KV cache, and the fingerprint that peers compare.

A pool of one cache group is one allocation, C-contiguous:

    [block, layer, K/V, kv_head, token, head_dim]
     |      |      |    |        '------ head_dim * itemsize bytes: one head of one token
     |      |      |    '--------------- block_tokens of these: one head of a block (a TP split slices these)
     |      |      '-------------------- num_kv_heads of these: K of one layer
     |      '--------------------------- 2 of these: `layer_bytes`, what a push of layers moves
     '---------------------------------- num_layers of these: `block_bytes`, what moves a block whole
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from pdserve.core.errors import FingerprintMismatch

PROTOCOL_VERSION: Final = 2
DTYPE_BYTES: Final[dict[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers that share one KV geometry. `sliding_window` is in tokens; None is full attention."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    sliding_window: int | None = None
    total_kv_heads: int | None = None
    """Of the model, over all tensor-parallel ranks; None: ranks x `num_kv_heads`, no head is replicated."""

    @property
    def token_head_bytes(self) -> int:
        return self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    """A cache group cut into blocks of `block_tokens` tokens."""

    group: CacheGroup
    block_tokens: int

    @property
    def layer_bytes(self) -> int:
        return 2 * self.group.num_kv_heads * self.block_tokens * self.group.token_head_bytes

    @property
    def block_bytes(self) -> int:
        return self.group.num_layers * self.layer_bytes

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        g = self.group
        return (num_blocks, g.num_layers, 2, g.num_kv_heads, self.block_tokens, g.head_dim)

    def offset(self, block: int, layer: int) -> int:
        """Byte offset of `layer` of `block` from the start of the pool."""
        return block * self.block_bytes + layer * self.layer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The part of a model's KV heads that one tensor-parallel rank's pool holds.

    Ranks hold consecutive runs of heads; where there are more ranks than heads, neighbours hold the same one.
    """

    layout: GroupLayout
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def num_heads(self) -> int:
        return self.layout.group.num_kv_heads

    @property
    def total_heads(self) -> int:
        total = self.layout.group.total_kv_heads
        return self.num_heads * self.tp_size if total is None else total

    @property
    def first_head(self) -> int:
        return self.tp_rank * self.total_heads // self.tp_size

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same heads."""
        return max(1, self.tp_size // self.total_heads)

    @property
    def replica(self) -> int:
        """Which of them this rank is."""
        return self.tp_rank % self.num_replicas

    @property
    def consistent(self) -> bool:
        """Ranks divide the heads evenly, or heads the ranks, and the pool holds just this rank's part."""
        ranks, heads = self.tp_size, self.total_heads
        if not 0 <= self.tp_rank < ranks:
            return False
        if ranks <= heads:
            return heads % ranks == 0 and self.num_heads == heads // ranks
        return ranks % heads == 0 and self.num_heads == 1


def blocks_for(tokens: int, block_tokens: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What two peers must agree on before the first byte. Tensor-parallel rank and size may differ."""

    protocol: int
    model: str
    """Digest of the model's config and weights index, not its display name."""
    layouts: tuple[GroupLayout, ...]
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What this rank holds of each cache group."""
        return tuple(Shard(layout=one, tp_rank=self.tp_rank, tp_size=self.tp_size) for one in self.layouts)

    def require_same(self, other: Fingerprint, *, peer: str) -> None:
        """Raise `FingerprintMismatch` that names the first field in which two workers' caches differ."""
        if len(self.layouts) == len(other.layouts):
            for mine, its in zip(self.layouts, other.layouts, strict=True):
                if mine.block_tokens != its.block_tokens:
                    raise FingerprintMismatch(peer, "block_size", mine.block_tokens, its.block_tokens)
        self.require_transferable(other, peer=peer)

    def require_transferable(self, other: Fingerprint, *, peer: str) -> None:
        """Raise `FingerprintMismatch` unless KV of one is KV of the other, cut into heads and blocks as it
        may be."""
        for field in ("protocol", "model"):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                raise FingerprintMismatch(peer, field, ours, theirs)
        if len(self.layouts) != len(other.layouts):
            raise FingerprintMismatch(peer, "layouts", len(self.layouts), len(other.layouts))
        for mine, its in zip(self.shards, other.shards, strict=True):
            _require_heads(mine, its, peer)


def _require_heads(mine: Shard, its: Shard, peer: str) -> None:
    name = mine.layout.group.name
    for entry in dataclasses.fields(CacheGroup):
        if entry.name in ("num_kv_heads", "total_kv_heads"):
            continue
        ours, theirs = getattr(mine.layout.group, entry.name), getattr(its.layout.group, entry.name)
        if ours != theirs:
            raise FingerprintMismatch(peer, f"{name}.{entry.name}", ours, theirs)
    if mine.total_heads != its.total_heads:
        raise FingerprintMismatch(peer, f"{name}.total_kv_heads", mine.total_heads, its.total_heads)
    if not (mine.consistent and its.consistent):
        found = [f"{s.num_heads} heads on rank {s.tp_rank} of {s.tp_size}" for s in (mine, its)]
        raise FingerprintMismatch(peer, f"{name}.num_kv_heads", *found)
