"""Who holds which KV block: the ledger of one worker's pool. Pure bookkeeping, no memory behind it.

    allocate                    hold / rehold / release
       |                                 |
       v                                 v
    [free] ------> [held] --quarantine--> [quarantined]     a remote write or read may still touch it
       ^            |  ^                     |
       |            v  |                     v
       '-------- [cached] <------------------'              nobody but the prefix cache holds it

A block has a set of holders and is free when nobody holds it. Its state follows from the strongest holder:
compute, sender or receiver make it held; else a quarantine makes it quarantined; else the cache makes it
cached. Its generation rises with every allocation, so that a stale reference can be told from a live one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from pdserve.core.errors import BlockPoolExhausted, InvariantViolated
from pdserve.core.ids import AttemptId, BlockId
from pdserve.core.worker_state import BlockCounts

_AUDIT_WINDOW = 64


class HolderKind(Enum):
    COMPUTE = "compute"
    """A sequence whose steps read the block, or write it."""
    SENDER = "sender"
    """A push that reads the block."""
    RECEIVER = "receiver"
    """A peer's push that writes the block."""
    CACHE = "cache"
    QUARANTINE = "quarantine"
    """The attempt is over, but a transfer that touches the block is not known to be terminal."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a block: a kind, and the attempt on whose behalf. The cache holds for none."""

    kind: HolderKind
    attempt: AttemptId | None

    def __str__(self) -> str:
        return f"{self.kind.value}({self.attempt})" if self.attempt else self.kind.value


CACHE_HOLDER = Holder(HolderKind.CACHE, None)


class BlockState(IntEnum):
    FREE = 0
    HELD = 1
    CACHED = 2
    QUARANTINED = 3


class BlockPool:
    """Blocks 0..num_blocks-1. Every operation is O(1) per block; misuse raises `InvariantViolated`."""

    def __init__(self, num_blocks: int) -> None:
        self._holders: list[set[Holder]] = [set() for _ in range(num_blocks)]
        self._generation = [0] * num_blocks
        self._state = [BlockState.FREE] * num_blocks
        self._counts = [num_blocks, 0, 0, 0]
        self._free = [BlockId(i) for i in range(num_blocks - 1, -1, -1)]
        # Held by the cache alone, the longest unused first: the order in which they are evicted.
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        self._audit_from = 0

    @property
    def num_blocks(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        return self._counts[BlockState.FREE]

    @property
    def num_available(self) -> int:
        """Free, or free once the cache lets go."""
        return self._counts[BlockState.FREE] + self._counts[BlockState.CACHED]

    def counts(self) -> BlockCounts:
        free, held, cached, quarantined = self._counts
        return BlockCounts(
            total=self.num_blocks, free=free, held=held, cached=cached, quarantined=quarantined
        )

    def state(self, block: BlockId) -> BlockState:
        return self._state[block]

    def holders(self, block: BlockId) -> frozenset[Holder]:
        return frozenset(self._holders[block])

    def generation(self, block: BlockId) -> int:
        """Rises with every allocation of the block."""
        return self._generation[block]

    def allocate(self, count: int, holder: Holder) -> list[BlockId]:
        """`count` free blocks, held by `holder`. Raises `BlockPoolExhausted` and takes none if there are
        fewer; the caller evicts cached blocks first (`PrefixCache.allocate` does)."""
        if count > len(self._free):
            raise BlockPoolExhausted(wanted=count, free=len(self._free))
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            if self._holders[block]:
                raise InvariantViolated(
                    f"block {block} was on the free list while {self._who(block)} held it"
                )
            self._generation[block] += 1
            self._holders[block].add(holder)
            self._settle(block)
        return blocks

    def hold(self, block: BlockId, holder: Holder) -> None:
        """Add a holder to a block that somebody holds already."""
        holders = self._known(block)
        if not holders:
            raise InvariantViolated(f"{holder} wants block {block}, which is free: allocate it")
        if holder in holders:
            raise InvariantViolated(f"{holder} holds block {block} already")
        holders.add(holder)
        self._settle(block)

    def release(self, block: BlockId, holder: Holder) -> None:
        """Remove a holder; the block is free when it was the last one."""
        holders = self._known(block)
        if holder not in holders:
            raise InvariantViolated(
                f"{holder} gives back block {block}, which it does not hold ({self._who(block)} does)"
            )
        holders.remove(holder)
        self._settle(block)

    def rehold(self, block: BlockId, before: Holder, after: Holder) -> None:
        """Replace one holder by another in one step, such as receiver by compute when a push has landed."""
        self.hold(block, after)
        self.release(block, before)

    def release_all(self, blocks: Sequence[BlockId], holder: Holder) -> None:
        """Give back in reverse, so that of a cached chain the tail is evicted before its head."""
        for block in reversed(blocks):
            self.release(block, holder)

    def quarantine(self, blocks: Iterable[BlockId], holder: Holder) -> None:
        """Turn a sender's or receiver's hold into a quarantine of the same attempt; see `quarantined_by`."""
        if holder.kind not in (HolderKind.SENDER, HolderKind.RECEIVER):
            raise InvariantViolated(f"only a transfer's blocks are quarantined, not those of {holder}")
        for block in blocks:
            self.rehold(block, holder, quarantined_by(holder.attempt))

    def require_writable(self, block: BlockId, holder: Holder) -> None:
        """Raise unless `holder` alone holds the block: nobody writes what another may read or write."""
        if self._known(block) != {holder}:
            raise InvariantViolated(f"{holder} would write block {block} while {self._who(block)} holds it")

    def oldest_idle(self) -> BlockId | None:
        """The block that the cache alone has held for longest, or None."""
        return next(iter(self._idle), None)

    def touch(self, block: BlockId) -> None:
        """Make an idle cached block the last to be evicted."""
        if block in self._idle:
            self._idle.move_to_end(block)

    def check(self) -> None:
        """Conservation of the whole pool and a full look at the next few blocks; cheap, for every sweep.

        Raises `InvariantViolated`.
        """
        free, held, cached, quarantined = self._counts
        if free + held + cached + quarantined != self.num_blocks or min(self._counts) < 0:
            raise InvariantViolated(f"blocks are not conserved: {self.counts()}")
        if free != len(self._free) or cached != len(self._idle):
            raise InvariantViolated(
                f"free list {len(self._free)}, cached list {len(self._idle)}, but {self.counts()}"
            )
        last = min(self._audit_from + _AUDIT_WINDOW, self.num_blocks)
        self._audit(range(self._audit_from, last))
        self._audit_from = 0 if last == self.num_blocks else last

    def audit(self) -> None:
        """`check`, over every block. For idle moments, after a failed step, and tests."""
        self.check()
        self._audit(range(self.num_blocks))
        if len(set(self._free)) != len(self._free):
            raise InvariantViolated("a block is on the free list twice")

    def _audit(self, blocks: range) -> None:
        for index in blocks:
            block = BlockId(index)
            if self._state[block] is not _state_of(self._holders[block]):
                raise InvariantViolated(f"block {block} is {self._state[block].name}, {self._who(block)}")
            if (block in self._idle) != (self._state[block] is BlockState.CACHED):
                raise InvariantViolated(f"block {block} is {self._state[block].name}, cached list disagrees")

    def _known(self, block: BlockId) -> set[Holder]:
        if not 0 <= block < self.num_blocks:
            raise InvariantViolated(f"block {block} is not in this pool of {self.num_blocks}")
        return self._holders[block]

    def _settle(self, block: BlockId) -> None:
        before, after = self._state[block], _state_of(self._holders[block])
        if before is after:
            return
        self._state[block] = after
        self._counts[before] -= 1
        self._counts[after] += 1
        if before is BlockState.CACHED:
            del self._idle[block]
        if after is BlockState.CACHED:
            self._idle[block] = None
        elif after is BlockState.FREE:
            self._free.append(block)

    def _who(self, block: BlockId) -> str:
        return ", ".join(sorted(str(holder) for holder in self._holders[block])) or "nobody"


def quarantined_by(attempt: AttemptId | None) -> Holder:
    """The holder of blocks that `BlockPool.quarantine` set apart for an attempt."""
    return Holder(HolderKind.QUARANTINE, attempt)


def _state_of(holders: set[Holder]) -> BlockState:
    if not holders:
        return BlockState.FREE
    kinds = {holder.kind for holder in holders}
    if kinds & _LIVE:
        return BlockState.HELD
    return BlockState.QUARANTINED if HolderKind.QUARANTINE in kinds else BlockState.CACHED


_LIVE = frozenset({HolderKind.COMPUTE, HolderKind.SENDER, HolderKind.RECEIVER})
