"""Tells coordinators which blocks a prefix cache and the tiers below it hold: first all, then what comes and
goes. Pure."""

from __future__ import annotations

from pdserve.core.ids import WorkerId
from pdserve.core.prefix import pack_keys
from pdserve.core.worker_state import PrefixEvents
from pdserve.engine.prefix_cache import CacheJournal, PrefixCache
from pdserve.worker.events import OwnerId, Send
from pdserve.worker.tiering import Tiering


class PrefixFeed:
    """One per worker. Of the cache nothing is written down while no coordinator is there."""

    def __init__(self, worker: WorkerId, epoch: int, cache: PrefixCache, tiering: Tiering) -> None:
        self._worker, self._epoch, self._cache, self._tiering = worker, epoch, cache, tiering
        self._sequence = 0
        self._following: set[OwnerId] = set()
        self._new: set[OwnerId] = set()

    def met(self, owner: OwnerId) -> None:
        """A coordinator has come, or missed something: it gets a snapshot, of a cache that keeps anything."""
        if self._cache.enabled:
            self._new.add(owner)

    def lost(self, owner: OwnerId) -> None:
        self._new.discard(owner)
        self._following.discard(owner)
        if not self._following:
            self._cache.journal = None

    def due(self) -> list[Send]:
        """What has changed since the last call, to everyone who follows."""
        sends = self._changes(self._tiering.changes())
        if self._new:
            cached, below = CacheJournal(), CacheJournal()
            cached.stored = dict.fromkeys(self._cache.hashes())
            below.stored = dict.fromkeys(self._tiering.below)
            snapshot = self._events(cached, below, snapshot=True)
            sends += [Send(owner, snapshot) for owner in sorted(self._new)]
            self._following |= self._new
            self._new.clear()
            if self._cache.journal is None:
                self._cache.journal = CacheJournal()
        return sends

    def _changes(self, below: CacheJournal) -> list[Send]:
        journal = self._cache.journal
        if journal is None or not (journal.stored or journal.evicted or below.stored or below.evicted):
            return []
        self._cache.journal = CacheJournal()
        self._sequence += 1
        events = self._events(journal, below, snapshot=False)
        return [Send(owner, events) for owner in sorted(self._following - self._new)]

    def _events(self, cached: CacheJournal, below: CacheJournal, *, snapshot: bool) -> PrefixEvents:
        return PrefixEvents(
            worker=self._worker,
            epoch=self._epoch,
            sequence=self._sequence,
            stored=pack_keys(cached.stored),
            evicted=pack_keys(cached.evicted),
            snapshot=snapshot,
            tier_stored=pack_keys(below.stored),
            tier_evicted=pack_keys(below.evicted),
        )
