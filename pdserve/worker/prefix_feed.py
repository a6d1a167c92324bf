"""Tells coordinators which blocks a prefix cache holds: first all, then what comes and goes. Pure."""

from __future__ import annotations

from pdserve.core.ids import WorkerId
from pdserve.core.messages import PrefixEvents
from pdserve.core.prefix import pack_keys
from pdserve.engine.prefix_cache import CacheJournal, PrefixCache
from pdserve.worker.events import OwnerId, Send


class PrefixFeed:
    """One per worker. Nothing is written down while no coordinator is there."""

    def __init__(self, worker: WorkerId, epoch: int, cache: PrefixCache) -> None:
        self._worker, self._epoch, self._cache = worker, epoch, cache
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
        sends = self._changes()
        if self._new:
            snapshot = self._events(pack_keys(self._cache.hashes()), b"", snapshot=True)
            sends += [Send(owner, snapshot) for owner in sorted(self._new)]
            self._following |= self._new
            self._new.clear()
            if self._cache.journal is None:
                self._cache.journal = CacheJournal()
        return sends

    def _changes(self) -> list[Send]:
        journal = self._cache.journal
        if journal is None or not (journal.stored or journal.evicted):
            return []
        self._cache.journal = CacheJournal()
        self._sequence += 1
        events = self._events(pack_keys(journal.stored), pack_keys(journal.evicted), snapshot=False)
        return [Send(owner, events) for owner in sorted(self._following - self._new)]

    def _events(self, stored: bytes, evicted: bytes, *, snapshot: bool) -> PrefixEvents:
        return PrefixEvents(
            worker=self._worker,
            epoch=self._epoch,
            sequence=self._sequence,
            stored=stored,
            evicted=evicted,
            snapshot=snapshot,
        )
