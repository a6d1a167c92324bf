"""Prefixes that a worker awaits from a peer's cache, and blocks that one may still write. Pure.

receive --blocks--> awaited --PrefixNote--> the cache's
                       '--ended before that--> quarantine --settled | landed | writer gone--> back
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvtransfer.protocol import NoteArrived
from pdserve.core.codec import decode
from pdserve.core.errors import CorruptTransfer, DeadlineExceeded, PdServeError, ProtocolError, TransferError
from pdserve.core.handover import PrefixNote
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.messages import KvArrived, Orphaned, ReceivePrefix, RefusalReason, Refused, Reserved
from pdserve.engine.block_pool import BlockPool, BlockState, Holder, HolderKind, quarantined_by
from pdserve.engine.prefix_cache import BlockHash, PrefixCache, PrefixHashes
from pdserve.worker.events import Action, OwnerId, Send
from pdserve.worker.failures import AttemptInUse, attempt_failed
from pdserve.worker.peers import PeerTable

log = logging.getLogger(__name__)

GONE_PEER_GRACE_S: Final = 1.0
"""After a peer's process ended, its last packets may still sit in this host's socket buffers."""

Handled = tuple[list[Action], bool]
"""What is to be done, and whether the event was about nothing else."""


@dataclass(slots=True, kw_only=True)
class _Receipt:
    """A prefix that is awaited; or, once `ended`, blocks in quarantine."""

    owner: OwnerId | None
    """None: its coordinator is gone."""
    attempt: AttemptId
    digests: list[BlockHash]
    cached: list[BlockId]
    fresh: list[BlockId]
    writer: WorkerId
    writer_epoch: int
    lease_until: float
    ended: bool = False
    release_at: float | None = None

    @property
    def reading(self) -> Holder:
        return Holder(HolderKind.COMPUTE, self.attempt)

    @property
    def receiving(self) -> Holder:
        return Holder(HolderKind.RECEIVER, self.attempt)


class PrefixReceipts:
    """By attempt, from the reservation to arrival or to the end of quarantine."""

    def __init__(
        self,
        worker: WorkerId,
        pool: BlockPool,
        cache: PrefixCache,
        peers: PeerTable,
        block_tokens: int,
        draining: Callable[[], bool],
    ) -> None:
        self._worker, self._pool, self._cache, self._peers = worker, pool, cache, peers
        self._block_tokens, self._draining = block_tokens, draining
        self._of: dict[AttemptId, _Receipt] = {}

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._of

    def sweep(self, now: float) -> list[Action]:
        """Leases that ran out, and quarantines whose grace has."""
        for receipt in list(self._of.values()):
            if receipt.release_at is not None and receipt.release_at <= now:
                self._release(receipt)
        late = [r for r in self._of.values() if not r.ended and r.lease_until <= now]
        return [action for receipt in late for action in self._fail(receipt, _expired(receipt))]

    def next_wake(self) -> float | None:
        times = [r.lease_until for r in self._of.values() if not r.ended]
        times += [r.release_at for r in self._of.values() if r.release_at is not None]
        return min(times, default=None)

    def cancel(self, owner: OwnerId, attempt: AttemptId) -> None:
        receipt = self._of[attempt]
        if not receipt.ended and receipt.owner == owner:
            self._quarantine(receipt)

    def renew(self, owner: OwnerId, attempt: AttemptId, until: float) -> None:
        receipt = self._of[attempt]
        if receipt.owner == owner:
            receipt.lease_until = max(receipt.lease_until, until)

    def owner_lost(self, owner: OwnerId) -> None:
        for receipt in self._of.values():
            if receipt.owner == owner:
                receipt.owner = None
                if not receipt.ended:
                    self._quarantine(receipt)

    def orphans(self) -> list[Orphaned]:
        """Those whose coordinator is gone."""
        return [
            Orphaned(attempt=r.attempt, writer=r.writer, writer_epoch=r.writer_epoch)
            for r in self._of.values()
            if r.owner is None
        ]

    def peer_lost(self, peer: WorkerId, up_to: int | None, error: PdServeError) -> list[Action]:
        """Awaited prefixes of a peer fail; pushes to it end by themselves, as the transport says."""
        hit = [
            receipt
            for receipt in self._of.values()
            if receipt.writer == peer
            and not receipt.ended
            and (up_to is None or receipt.writer_epoch <= up_to)
        ]
        return [action for receipt in hit for action in self._fail(receipt, error)]

    def writer_gone(self, peer: WorkerId, up_to: int, now: float) -> None:
        for receipt in self._of.values():
            if receipt.writer == peer and receipt.writer_epoch <= up_to:
                receipt.release_at = now + GONE_PEER_GRACE_S

    def receive(self, owner: OwnerId, message: ReceivePrefix, now: float) -> list[Action]:
        attempt, size = message.attempt, self._block_tokens
        known = self._of.get(attempt)
        if known is not None:
            said_twice = known.owner == owner and not known.ended
            return [] if said_twice else [Send(owner, attempt_failed(attempt, AttemptInUse(attempt)))]
        epoch = self._peers.epoch(message.writer)
        if self._draining():
            return [_refused(owner, attempt, RefusalReason.DRAINING, f"worker {self._worker} is draining")]
        if epoch is None:
            what = f"{message.writer} is not connected"
            return [_refused(owner, attempt, RefusalReason.UNKNOWN_PEER, what)]
        digests = list(PrefixHashes(message.cache_salt, size).of(message.tokens))
        cached = self._cache.beginning(digests)
        missing = len(digests) - len(cached)
        idle = sum(1 for block in cached if self._pool.state(block) is BlockState.CACHED)
        if missing > self._pool.num_available - idle:
            what = f"{missing} blocks wanted, {self._pool.counts()}"
            return [_refused(owner, attempt, RefusalReason.NO_BLOCKS, what)]
        fresh: list[BlockId] = []
        if missing:
            fresh = self._await(owner, message, epoch, digests, cached, now)
        reserved = Reserved(attempt=attempt, blocks=[*cached, *fresh], cached_tokens=len(cached) * size)
        return [Send(owner, reserved)]

    def _await(
        self,
        owner: OwnerId,
        message: ReceivePrefix,
        epoch: int,
        digests: list[BlockHash],
        cached: list[BlockId],
        now: float,
    ) -> list[BlockId]:
        receipt = _Receipt(
            owner=owner,
            attempt=message.attempt,
            digests=digests,
            cached=cached,
            fresh=[],
            writer=message.writer,
            writer_epoch=epoch,
            lease_until=now + message.lease_s,
        )
        for block in cached:
            self._pool.hold(block, receipt.reading)  # what comes is of use only behind these
        receipt.fresh = self._cache.allocate(len(digests) - len(cached), receipt.receiving)
        self._of[message.attempt] = receipt
        return receipt.fresh

    def note(self, event: NoteArrived) -> Handled:
        try:
            note = decode(event.note)
        except ProtocolError:
            return [], False  # counted by who expects pushes of requests
        if not isinstance(note, PrefixNote):
            return [], False
        receipt = self._of.get(note.attempt)
        if receipt is None:
            log.warning("%s: a prefix of unknown attempt %s", self._worker, note.attempt)
            return [], True
        if receipt.ended:
            log.warning("%s: the prefix of %s came after its end", self._worker, note.attempt)
            self._release(receipt)
            return [], True
        return self._landed(receipt, note, event.error), True

    def _landed(self, receipt: _Receipt, note: PrefixNote, wrong: str) -> list[Action]:
        """Its one push is in the pool: nothing writes its blocks any more."""
        size = self._block_tokens
        count, first = note.num_tokens // size, len(receipt.cached)
        if wrong:
            log.error("%s: the prefix of %s is damaged: %s", self._worker, note.attempt, wrong)
            return self._fail(receipt, CorruptTransfer(f"attempt {note.attempt}: {wrong}"), landed=True)
        if note.num_tokens % size or not first < count <= len(receipt.digests):
            what = f"attempt {note.attempt}: {note.num_tokens} tokens came, {first * size} were here, "
            error = TransferError(f"{what}{len(receipt.digests) * size} were awaited")
            return self._fail(receipt, error, landed=True)
        for digest, block in zip(receipt.digests[first:count], receipt.fresh, strict=False):
            self._cache.insert(digest, block)
        self._release(receipt)
        return [] if receipt.owner is None else [Send(receipt.owner, KvArrived(attempt=receipt.attempt))]

    def settled(self, owner: OwnerId, attempt: AttemptId) -> list[Action]:
        """A coordinator speaks for its own, and for those whose coordinator is gone."""
        receipt = self._of[attempt]
        if receipt.owner not in (owner, None):
            return []
        if receipt.ended:
            self._release(receipt)
            return []
        return self._fail(receipt, TransferError(f"{receipt.writer} did not push the prefix"), landed=True)

    def _fail(self, receipt: _Receipt, error: PdServeError, *, landed: bool = False) -> list[Action]:
        """landed: no write of it is under way any more."""
        if landed:
            self._release(receipt)
        else:
            self._quarantine(receipt)
        return [] if receipt.owner is None else [Send(receipt.owner, attempt_failed(receipt.attempt, error))]

    def _quarantine(self, receipt: _Receipt) -> None:
        receipt.ended = True
        self._pool.quarantine(receipt.fresh, receipt.receiving)
        self._pool.release_all(receipt.cached, receipt.reading)
        receipt.cached = []

    def _release(self, receipt: _Receipt) -> None:
        del self._of[receipt.attempt]
        holder = quarantined_by(receipt.attempt) if receipt.ended else receipt.receiving
        self._pool.release_all(receipt.fresh, holder)
        self._pool.release_all(receipt.cached, receipt.reading)


def _refused(owner: OwnerId, attempt: AttemptId, reason: RefusalReason, detail: str) -> Action:
    return Send(owner, Refused(attempt=attempt, reason=reason, detail=detail))


def _expired(receipt: _Receipt) -> DeadlineExceeded:
    return DeadlineExceeded(f"attempt {receipt.attempt}: its prefix did not arrive within its lease")
