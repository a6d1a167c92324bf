"""The tiers of one worker, and the thread that copies between them and the pool.

    pool --store--> host --when it is full, the longest unused--> disk --when that is full--> gone
    pool <--load--- host, else disk

Loads go before stores. The caller holds the blocks of both until the event that ends them: a block that a
load may still write is nobody else's. What was brought back stays in its tier too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import numpy as np

from pdserve.core.ids import BlockId
from pdserve.core.worker_state import TierCounts
from pdserve.engine.prefix_cache import BlockHash
from pdserve.engine.tiers.blocks import BlockBytes, Bytes
from pdserve.engine.tiers.disk import DiskTier
from pdserve.engine.tiers.host import HostTier

log = logging.getLogger(__name__)

_HOST_BYTES_PER_S: Final = 4e9
_DISK_BYTES_PER_S: Final = 0.5e9
"""What is assumed until loads were measured."""
_WEIGHT: Final = 0.2
"""Of the newest measurement in the moving average."""


class Tier(StrEnum):
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class StoreBlock:
    """Copy a full block out of the pool; it is read until `BlockStored`."""

    digest: BlockHash
    block: BlockId


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Bring blocks back into the pool, in order; all of `blocks` may be written until `BlocksLoaded`."""

    ticket: int
    digests: tuple[BlockHash, ...]
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class BlockStored:
    """The pool's block is read no more. Whether a tier kept it, `find` says."""

    digest: BlockHash


@dataclass(frozen=True, slots=True)
class BlocksLoaded:
    """The first `num_loaded` blocks of a load hold their KV; nothing is known of the others."""

    ticket: int
    num_loaded: int


@dataclass(frozen=True, slots=True)
class TiersFailed:
    """The last event: nothing of it goes on any more."""

    error: str


TierCommand = StoreBlock | LoadBlocks
TierEvent = BlockStored | BlocksLoaded | TiersFailed


class TierPort(Protocol):
    """`TierStore`, as the workers use it. Nothing here blocks."""

    def start(self) -> None: ...
    def submit(self, command: TierCommand) -> None: ...
    def find(self, digests: Sequence[BlockHash]) -> list[Tier]: ...
    def holds(self, digest: BlockHash) -> bool: ...
    def seconds(self, tiers: Sequence[Tier]) -> float: ...
    def counts(self) -> TierCounts: ...
    def changes(self) -> list[tuple[BlockHash, bool]]: ...
    def stop(self) -> None: ...
    def join(self, timeout_s: float | None = None) -> bool: ...


class TierStore:
    """Owns the thread. `on_event` is called on it and must not block."""

    def __init__(
        self,
        pool: BlockBytes,
        host: HostTier,
        disk: DiskTier | None,
        on_event: Callable[[TierEvent], None],
        *,
        block_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pool, self._host, self._disk, self._on_event = pool, host, disk, on_event
        self._block_tokens, self._clock = block_tokens, clock
        self._changed = threading.Condition()
        self._loads: deque[LoadBlocks] = deque()
        self._stores: deque[StoreBlock] = deque()
        self._stopping = False
        self._buffer = np.empty(pool.block_bytes, dtype=np.uint8)
        self._rates = {Tier.HOST: _HOST_BYTES_PER_S, Tier.DISK: _DISK_BYTES_PER_S}
        self._blocks_to_load = 0
        self._hit_blocks = {Tier.HOST: 0, Tier.DISK: 0}
        self._stored_blocks = 0
        self._dropped_blocks = 0
        # Blocks that came or went, appended after that has happened; `changes` takes them out.
        self._touched: deque[BlockHash] = deque()
        if disk is not None:
            self._touched.extend(disk.digests())
            disk.on_forget = self._touched.append
        self._thread = threading.Thread(target=self._main, name="kv-tiers", daemon=True)

    # --- any thread ---------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: TierCommand) -> None:
        """Ignored once it has stopped or failed: `TiersFailed` ends everything."""
        with self._changed:
            if self._stopping:
                return
            if isinstance(command, LoadBlocks):
                self._loads.append(command)
                self._blocks_to_load += len(command.blocks)
            else:
                self._stores.append(command)
            self._changed.notify()

    def find(self, digests: Sequence[BlockHash]) -> list[Tier]:
        """Where each of the first blocks is, up to the first that is nowhere."""
        found: list[Tier] = []
        for digest in digests:
            if digest in self._host:
                found.append(Tier.HOST)
            elif self._disk is not None and digest in self._disk:
                found.append(Tier.DISK)
            else:
                break
        return found

    def holds(self, digest: BlockHash) -> bool:
        """Whether storing it would change nothing."""
        if self._host.num_slots:
            return digest in self._host
        return self._disk is not None and digest in self._disk

    def seconds(self, tiers: Sequence[Tier]) -> float:
        """What loading so many blocks will take, those that wait already included: measured rates."""
        size = self._pool.block_bytes
        waiting = self._blocks_to_load * size / self._rates[Tier.HOST]
        return waiting + sum(size / self._rates[tier] for tier in tiers)

    def changes(self) -> list[tuple[BlockHash, bool]]:
        """Blocks that may have come or gone since the last call, with whether any tier has them now.

        The first call tells what an earlier process left. For one thread.
        """
        digests = [self._touched.popleft() for _ in range(len(self._touched))]
        return [(digest, bool(self.find([digest]))) for digest in digests]

    def _load_bytes_per_s(self) -> float:
        host, disk = self._host.used_bytes, 0 if self._disk is None else self._disk.used_bytes
        if not host + disk:
            return 0.0
        return (host + disk) / (host / self._rates[Tier.HOST] + disk / self._rates[Tier.DISK])

    def counts(self) -> TierCounts:
        size, disk = self._pool.block_bytes, self._disk
        return TierCounts(
            host_bytes=self._host.used_bytes,
            disk_bytes=0 if disk is None else disk.used_bytes,
            host_hit_tokens=self._hit_blocks[Tier.HOST] * self._block_tokens,
            disk_hit_tokens=self._hit_blocks[Tier.DISK] * self._block_tokens,
            bytes_stored=self._stored_blocks * size,
            bytes_loaded=sum(self._hit_blocks.values()) * size,
            dropped_blocks=self._dropped_blocks + (0 if disk is None else disk.counters.dropped),
            corrupt_blocks=0 if disk is None else disk.counters.corrupt,
            load_bytes_per_s=self._load_bytes_per_s(),
            io_errors=0 if disk is None else disk.counters.errors,
        )

    def stop(self) -> None:
        """Ask the thread to end after the copy under way. May be called twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread to end, after `stop`. False when it has not within `timeout_s`."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the thread ---------------------------------------------------------------------------------

    def _main(self) -> None:
        error = "stopped"
        try:
            while (command := self._next()) is not None:
                if isinstance(command, LoadBlocks):
                    self._load(command)
                else:
                    self._store(command)
                    self._on_event(BlockStored(command.digest))
        except Exception as failure:  # the thread's outermost loop: the worker must hear of it
            log.exception("the tier thread failed")
            error = f"{type(failure).__name__}: {failure}"
        with self._changed:
            self._stopping = True
        if self._disk is not None:
            self._disk.close()
        self._on_event(TiersFailed(error))

    def _next(self) -> TierCommand | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._loads or self._stores)
            if self._stopping:
                return None
            return self._loads.popleft() if self._loads else self._stores.popleft()

    def _load(self, command: LoadBlocks) -> None:
        loaded = 0
        for digest, block in zip(command.digests, command.blocks, strict=True):
            began = self._clock()
            tier, data = self._bytes(digest)
            if data is None:
                break
            self._pool.write(block, data)
            self._measured(tier, self._clock() - began)
            self._hit_blocks[tier] += 1
            loaded += 1
        with self._changed:
            self._blocks_to_load -= len(command.blocks)
        self._on_event(BlocksLoaded(command.ticket, loaded))

    def _bytes(self, digest: BlockHash) -> tuple[Tier, Bytes | None]:
        data = self._host.get(digest)
        if data is not None:
            return Tier.HOST, data
        if self._disk is not None and self._disk.read(digest, self._buffer):
            return Tier.DISK, self._buffer
        return Tier.DISK, None

    def _measured(self, tier: Tier, seconds: float) -> None:
        rate = self._pool.block_bytes / max(seconds, 1e-9)
        self._rates[tier] += _WEIGHT * (rate - self._rates[tier])

    def _store(self, command: StoreBlock) -> None:
        if self.holds(command.digest):
            return
        if self._host.num_slots:
            if self._host.full:
                self._move_down()
            self._pool.read(command.block, self._host.room())
            self._host.keep(command.digest)
        elif self._disk is not None:
            self._pool.read(command.block, self._buffer)
            if not self._disk.write(command.digest, self._buffer):
                return
        self._touched.append(command.digest)
        self._stored_blocks += 1

    def _move_down(self) -> None:
        """The longest unused block of the host tier goes to disk, or is gone."""
        digest, data = self._host.oldest()
        kept = self._disk is not None and self._disk.write(digest, data)
        self._dropped_blocks += not kept
        self._host.drop(digest)
        self._touched.append(digest)
