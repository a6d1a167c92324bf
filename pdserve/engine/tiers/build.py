"""A worker's tiers, as its configuration asks for them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgpack
import torch

from pdserve.core.config import CacheSettings
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint, GroupLayout
from pdserve.engine.tiers.blocks import BlockBytes, DeviceBlocks, HostBlocks
from pdserve.engine.tiers.disk import DirectoryInUse, DiskTier
from pdserve.engine.tiers.host import HostTier
from pdserve.engine.tiers.store import TierEvent, TierStore

log = logging.getLogger(__name__)

GIB = 1 << 30


def block_bytes_of(pool: torch.Tensor, layout: GroupLayout, num_blocks: int) -> BlockBytes:
    """The pool's blocks as bytes, wherever it is."""
    if pool.device.type == "cpu":
        return HostBlocks(pool.data_ptr(), layout, num_blocks)
    return DeviceBlocks(pool, layout, num_blocks)


def make_tiers(
    settings: CacheSettings,
    worker: WorkerId,
    fingerprint: Fingerprint,
    blocks: Callable[[], BlockBytes],
    on_event: Callable[[TierEvent], None],
) -> TierStore | None:
    """None where no tier is configured, or prefix caching is off. `blocks` is called else.

    A disk directory that another process still uses is left to it, loudly: the worker goes on without.
    Raises `ConfigError` for a directory that cannot be used at all.
    """
    host_bytes, disk_bytes = int(settings.host_tier_gib * GIB), int(settings.disk_tier_gib * GIB)
    if not settings.enable_prefix_caching or not host_bytes + disk_bytes:
        return None
    pool = blocks()
    size = pool.block_bytes
    for name, wanted in (("host_tier_gib", host_bytes), ("disk_tier_gib", disk_bytes)):
        if 0 < wanted < 2 * size:
            raise ConfigError(f"cache.{name} holds less than two KV blocks of {size} bytes: give it more")
    disk = None
    if disk_bytes:
        if settings.disk_tier_path is None:
            raise ConfigError("cache.disk_tier_gib needs cache.disk_tier_path: a directory on a local disk")
        try:
            identity = _identity(fingerprint)
            disk = DiskTier(Path(settings.disk_tier_path) / worker, disk_bytes, size, identity)
        except DirectoryInUse as error:
            log.error("%s goes on without its disk tier: %s", worker, error)
    tokens = fingerprint.layouts[0].block_tokens
    return TierStore(pool, HostTier(host_bytes, size), disk, on_event, block_tokens=tokens)


def _identity(fingerprint: Fingerprint) -> bytes:
    """Whose KV a file holds: every field of the fingerprint, and so the model's weights."""
    return hashlib.sha256(bytes(msgpack.packb(dataclasses.asdict(fingerprint)))).digest()
