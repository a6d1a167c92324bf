"""Which full blocks hold which tokens: hits, and eviction. Hashes are those of `pdserve.core.prefix`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.core.errors import BlockPoolExhausted
from pdserve.core.ids import BlockId
from pdserve.core.prefix import BlockHash as BlockHash
from pdserve.core.prefix import PrefixHashes as PrefixHashes
from pdserve.engine.block_pool import CACHE_HOLDER, BlockPool, BlockState, Holder


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks of one sequence, in order: what the cache had, then new ones."""

    cached: list[BlockId]
    fresh: list[BlockId]


@dataclass(slots=True)
class HitStats:
    """Tokens, since start."""

    hit_tokens: int = 0
    query_tokens: int = 0


@dataclass(slots=True)
class CacheJournal:
    """Since it was read last, in no order: a block that came and went is in neither, or came again."""

    stored: dict[BlockHash, None] = field(default_factory=dict)
    evicted: dict[BlockHash, None] = field(default_factory=dict)

    def came(self, digest: BlockHash) -> None:
        if digest in self.evicted:
            del self.evicted[digest]
        else:
            self.stored[digest] = None

    def went(self, digest: BlockHash) -> None:
        if digest in self.stored:
            del self.stored[digest]
        else:
            self.evicted[digest] = None


class PrefixCache:
    """Keeps full blocks after their requests until another needs the room, least recently used first.

    Disabled, it never hits and keeps nothing; allocation works the same.
    """

    def __init__(self, pool: BlockPool, *, block_tokens: int, enabled: bool) -> None:
        self.stats = HitStats()
        self.on_insert: Callable[[BlockHash], object] | None = None
        """Told of every block that is kept."""
        self.journal: CacheJournal | None = None
        """Where what comes and goes is written down, if anybody wants to know."""
        self._pool = pool
        self._block_tokens = block_tokens
        self._enabled = enabled
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def enabled(self) -> bool:
        return self._enabled

    def hashes(self) -> list[BlockHash]:
        """Of all blocks that are kept."""
        return list(self._block_of)

    def lookup(self, hashes: Sequence[BlockHash], num_tokens: int) -> list[BlockId]:
        """Blocks of the longest cached prefix of a sequence of `num_tokens` tokens.

        It ends before the last token, which is always computed: its logits are needed.
        """
        return self.beginning(hashes[: (num_tokens - 1) // self._block_tokens])

    def claim(self, hashes: Sequence[BlockHash], num_tokens: int, holder: Holder) -> list[BlockId]:
        """`lookup`, hold what was found, and count the hit."""
        blocks = self.lookup(hashes, num_tokens)
        for block in blocks:
            self._pool.hold(block, holder)
        self.stats.query_tokens += num_tokens
        self.stats.hit_tokens += len(blocks) * self._block_tokens
        return blocks

    def insert(self, digest: BlockHash, block: BlockId) -> bool:
        """Keep a computed full block; False when its tokens are cached already, in another block."""
        if not self._enabled or digest in self._block_of or block in self._hash_of:
            return False
        self._pool.hold(block, CACHE_HOLDER)
        self._block_of[digest] = block
        self._hash_of[block] = digest
        if self.journal is not None:
            self.journal.came(digest)
        if self.on_insert is not None:
            self.on_insert(digest)
        return True

    def block_of(self, digest: BlockHash) -> BlockId | None:
        """Where a block is kept, or None."""
        return self._block_of.get(digest)

    def beginning(self, digests: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the longest prefix that is kept, to the end of `digests`."""
        blocks: list[BlockId] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self, count: int, holder: Holder) -> list[BlockId]:
        """`count` blocks, evicting the least recently used cached ones where needed.

        Raises `BlockPoolExhausted`, having evicted nothing, when there are not enough.
        """
        if count > self._pool.num_available:
            raise BlockPoolExhausted(wanted=count, free=self._pool.num_available)
        while self._pool.num_free < count:
            self._evict_one()
        return self._pool.allocate(count, holder)

    def reserve(
        self,
        hashes: Sequence[BlockHash],
        num_tokens: int,
        *,
        total: int,
        cached_holder: Holder,
        fresh_holder: Holder,
        spare: int = 0,
    ) -> Reservation | None:
        """`total` blocks for a sequence, its cached prefix first; None, and nothing changed, when they and
        `spare` more are not there. Idle blocks that the prefix hits are not free to be taken as well."""
        cached = self.lookup(hashes, num_tokens)
        idle = sum(1 for block in cached if self._pool.state(block) is BlockState.CACHED)
        if total - len(cached) + spare > self._pool.num_available - idle:
            return None
        cached = self.claim(hashes, num_tokens, cached_holder)
        return Reservation(cached, self.allocate(total - len(cached), fresh_holder))

    def clear(self) -> None:
        """Let go of every block, such as after the weights changed."""
        for block in list(self._hash_of):
            self._forget(block)

    def _evict_one(self) -> None:
        block = self._pool.oldest_idle()
        if block is None:
            raise BlockPoolExhausted(wanted=1, free=self._pool.num_free)
        self._forget(block)

    def _forget(self, block: BlockId) -> None:
        digest = self._hash_of.pop(block)
        del self._block_of[digest]
        if self.journal is not None:
            self.journal.went(digest)
        self._pool.release(block, CACHE_HOLDER)
