"""What moves between the pool and the tiers below it, and when. Pure: the compute loop performs.

    cached for the first time --StoreBlock--> held as sender until BlockStored     (ahead of need: evicting
                                                                                    then costs nothing)
    a prompt's prefix is below --LoadBlocks--> fresh blocks, held as receiver until BlocksLoaded,
                                               then the prefix cache's; the prompt finds them there

A prompt waits for its prefix only where loading it, at the rate that was measured, is faster than computing
it. Others go on meanwhile.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from pdserve.core.ids import AttemptId, BlockId, RequestId
from pdserve.core.layout import blocks_for
from pdserve.core.worker_state import TierCounts
from pdserve.engine.block_pool import BlockPool, BlockState, Holder, HolderKind
from pdserve.engine.prefix_cache import BlockHash, CacheJournal, PrefixCache
from pdserve.engine.tiers.store import (
    BlocksLoaded,
    BlockStored,
    LoadBlocks,
    StoreBlock,
    TierCommand,
    TierEvent,
    TierPort,
    TiersFailed,
)

log = logging.getLogger(__name__)

MAX_STORES: Final = 16
"""Blocks that are copied out at a time: those may not be evicted meanwhile."""
_TIERS: Final = RequestId("tiers")
_STORING: Final = Holder(HolderKind.SENDER, AttemptId(_TIERS, 0))


@dataclass(slots=True, eq=False)
class Fetch:
    """What a prompt waits for; done at once where there is nothing to bring."""

    done: bool = False


@dataclass(frozen=True, slots=True)
class _Load:
    command: LoadBlocks
    fetch: Fetch

    @property
    def holder(self) -> Holder:
        return Holder(HolderKind.RECEIVER, AttemptId(_TIERS, self.command.ticket))


class Tiering:
    """The tiers of one worker, as its scheduler sees them. With no store, nothing ever happens."""

    def __init__(
        self, pool: BlockPool, cache: PrefixCache, store: TierPort | None, *, block_tokens: int
    ) -> None:
        self._pool, self._cache, self._store = pool, cache, store
        self._block_tokens = block_tokens
        self._inserted: deque[BlockHash] = deque()
        if store is not None:
            cache.on_insert = self._inserted.append
        self._storing: dict[BlockHash, BlockId] = {}
        self._loads: dict[int, _Load] = {}
        self._loading: dict[BlockHash, Fetch] = {}
        self._tickets = itertools.count(1)
        self._commands: list[TierCommand] = []
        self._missed_blocks = 0
        self._below: set[BlockHash] = set()

    @property
    def below(self) -> Collection[BlockHash]:
        """Blocks in the tiers, as of the last `changes`."""
        return self._below

    def changes(self) -> CacheJournal:
        """What the tiers began and ceased to hold since the last call."""
        journal = CacheJournal()
        gone = ((digest, False) for digest in list(self._below))
        for digest, kept in gone if self._store is None else self._store.changes():
            if kept and digest not in self._below:
                self._below.add(digest)
                journal.came(digest)
            elif not kept and digest in self._below:
                self._below.remove(digest)
                journal.went(digest)
        return journal

    def counts(self) -> TierCounts:
        if self._store is None:
            return TierCounts()
        return dataclasses.replace(self._store.counts(), missed_blocks=self._missed_blocks)

    def commands(self) -> list[TierCommand]:
        """To be performed now: loads that `fetch` began, and what can be copied out."""
        if self._store is not None:
            self._store_some(self._store)
        commands, self._commands = self._commands, []
        return commands

    def fetch(self, digests: Sequence[BlockHash], num_tokens: int, tokens_per_s: float) -> Fetch | None:
        """Bring the prefix of a sequence of `num_tokens` tokens back into the pool, as far as it is worth it.

        tokens_per_s: at which they would be computed; 0 where it is not known, which counts as slow.
        None: the pool has no room for the sequence now; ask again.
        """
        store = self._store
        usable = digests[: (num_tokens - 1) // self._block_tokens]
        if store is None or not usable:
            return Fetch(done=True)
        cached = self._cache.lookup(usable, num_tokens)
        rest = usable[len(cached) :]
        if rest and rest[0] in self._loading:
            return self._loading[rest[0]]
        found = store.find(rest)
        if not found:
            return Fetch(done=True)
        seconds = store.seconds(found)
        if tokens_per_s > 0 and seconds >= len(found) * self._block_tokens / tokens_per_s:
            return Fetch(done=True)
        idle = sum(1 for block in cached if self._pool.state(block) is BlockState.CACHED)
        if blocks_for(num_tokens, self._block_tokens) - len(cached) > self._pool.num_available - idle:
            return None
        for block in cached:
            self._pool.touch(block)  # the load may evict, but not what it continues
        return self._begin(tuple(rest[: len(found)]))

    def handle(self, event: TierEvent) -> None:
        match event:
            case BlockStored(digest):
                self._pool.release(self._storing.pop(digest), _STORING)
            case BlocksLoaded(ticket, num_loaded):
                self._end(self._loads[ticket], num_loaded)
            case TiersFailed(error):
                self._fail(error)
            case _:
                assert_never(event)

    def _begin(self, digests: tuple[BlockHash, ...]) -> Fetch:
        ticket, fetch = next(self._tickets), Fetch()
        holder = Holder(HolderKind.RECEIVER, AttemptId(_TIERS, ticket))
        blocks = self._cache.allocate(len(digests), holder)
        load = _Load(LoadBlocks(ticket, digests, tuple(blocks)), fetch)
        self._loads[ticket] = load
        self._loading.update(dict.fromkeys(digests, fetch))
        self._commands.append(load.command)
        return fetch

    def _end(self, load: _Load, num_loaded: int) -> None:
        """Nothing writes its blocks any more: what holds KV is the cache's."""
        command = load.command
        del self._loads[command.ticket]
        for digest in command.digests:
            del self._loading[digest]
        for digest, block in zip(command.digests[:num_loaded], command.blocks, strict=False):
            self._cache.insert(digest, block)
        self._pool.release_all(command.blocks, load.holder)
        load.fetch.done = True

    def _store_some(self, store: TierPort) -> None:
        while self._inserted and len(self._storing) < MAX_STORES:
            digest = self._inserted.popleft()
            if digest in self._storing or store.holds(digest):
                continue
            block = self._cache.block_of(digest)
            if block is None:
                self._missed_blocks += 1
                continue
            self._pool.hold(block, _STORING)
            self._storing[digest] = block
            self._commands.append(StoreBlock(digest, block))

    def _fail(self, error: str) -> None:
        """Without tiers it goes on: they only save work."""
        if error != "stopped":
            log.error("the KV tiers have failed, and are off from now on: %s", error)
        self._store = None
        self._cache.on_insert = None
        self._commands.clear()
        for block in self._storing.values():
            self._pool.release(block, _STORING)
        self._storing.clear()
        for load in list(self._loads.values()):
            self._end(load, 0)
