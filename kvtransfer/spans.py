"""Which bytes a push moves: validation and arithmetic that every backend shares."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.protocol import PoolRegion, Push
from pdserve.core.errors import ConfigError, TransferError
from pdserve.core.layout import Fingerprint, GroupLayout

Span = tuple[int, int, int]
"""Source offset, destination offset, length; bytes from the start of each pool."""


def push_bytes(push: Push, layout: GroupLayout) -> int:
    """Bytes that `push` moves."""
    return len(push.src_blocks) * (push.layers[1] - push.layers[0]) * layout.layer_bytes


def push_spans(push: Push, layout: GroupLayout) -> list[Span]:
    """The contiguous pieces of a push, with neighbours on both sides merged."""
    first, last = push.layers
    length = (last - first) * layout.layer_bytes
    spans: list[Span] = []
    for src, dst in zip(push.src_blocks, push.dst_blocks, strict=True):
        a, b = layout.offset(src, first), layout.offset(dst, first)
        if spans and spans[-1][0] + spans[-1][2] == a and spans[-1][1] + spans[-1][2] == b:
            spans[-1] = (spans[-1][0], spans[-1][1], spans[-1][2] + length)
        else:
            spans.append((a, b, length))
    return spans


def require_push(push: Push, regions: Sequence[PoolRegion]) -> None:
    """Raise `TransferError` unless `push` reads inside this worker's pools and is well formed."""
    if not 0 <= push.group < len(regions):
        raise TransferError(f"push {push.id}: cache group {push.group}, this worker has {len(regions)}")
    region = regions[push.group]
    num_layers = region.layout.group.num_layers
    first, last = push.layers
    if not 0 <= first < last <= num_layers:
        raise TransferError(f"push {push.id}: layers [{first}, {last}) of {num_layers}")
    if not push.src_blocks or len(push.src_blocks) != len(push.dst_blocks):
        raise TransferError(
            f"push {push.id}: {len(push.src_blocks)} source blocks for {len(push.dst_blocks)} destinations"
        )
    require_blocks(push.id, "source", push.src_blocks, region.num_blocks)


def require_blocks(push_id: int, side: str, blocks: Sequence[int], num_blocks: int) -> None:
    """Raise `TransferError` unless every block is one of the pool's."""
    if min(blocks) < 0 or max(blocks) >= num_blocks:
        raise TransferError(
            f"push {push_id}: {side} blocks {min(blocks)}..{max(blocks)} of a pool of {num_blocks}"
        )


def require_regions(regions: Sequence[PoolRegion], fingerprint: Fingerprint) -> None:
    """Raise `ConfigError` unless the pools are what the fingerprint promises to peers."""
    if tuple(region.layout for region in regions) != fingerprint.layouts:
        raise ConfigError(
            f"{len(regions)} pools do not match the fingerprint's {len(fingerprint.layouts)} cache groups"
        )
    for region in regions:
        wanted = region.num_blocks * region.layout.block_bytes
        if region.size_bytes != wanted:
            raise ConfigError(
                f"pool of group {region.layout.group.name}: {region.size_bytes} bytes, "
                f"{region.num_blocks} blocks of {region.layout.block_bytes} take {wanted}"
            )
