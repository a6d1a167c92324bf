"""What every backend checks of pools, and of pushes before it touches them."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.protocol import PoolRegion, Push
from pdserve.core.errors import ConfigError, TransferError
from pdserve.core.layout import Fingerprint


def require_push(push: Push, regions: Sequence[PoolRegion]) -> None:
    """Raise `TransferError` unless `push` reads inside this worker's pools and is well formed."""
    if not 0 <= push.group < len(regions):
        raise TransferError(f"push {push.id}: cache group {push.group}, this worker has {len(regions)}")
    region = regions[push.group]
    num_layers = region.layout.group.num_layers
    first, last = push.layers
    if not 0 <= first < last <= num_layers:
        raise TransferError(f"push {push.id}: layers [{first}, {last}) of {num_layers}")
    if not push.src_blocks or not push.dst_blocks:
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
