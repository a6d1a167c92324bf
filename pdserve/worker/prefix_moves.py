"""Prefixes that move from one worker's cache into another's, apart from any request. Pure; for both roles.

    ReceivePrefix --blocks--> awaited --PrefixNote--> the cache's
                                 '--ended before that--> quarantine --settled | landed | writer gone--> back
    PushPrefix --what is cached here by now--> one push --its end--> TransferDone | PushesSettled

The same contract as for a prompt's KV: a block that a write may still reach is nobody else's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from kvtransfer.protocol import NoteArrived, PeerFailed, Push, PushEnded
from pdserve.core.codec import decode, encode
from pdserve.core.errors import (
    CorruptTransfer,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PdServeError,
    PeerLost,
    ProtocolError,
    TransferError,
)
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import GroupLayout
from pdserve.core.messages import (
    Cancel,
    DropPeer,
    Hello,
    KvArrived,
    Message,
    Orphaned,
    PrefixNote,
    PushesSettled,
    PushPrefix,
    ReceivePrefix,
    RefusalReason,
    Refused,
    RenewLease,
    Reserved,
    TransferDone,
)
from pdserve.engine.block_pool import BlockPool, BlockState, Holder, HolderKind, quarantined_by
from pdserve.engine.prefix_cache import BlockHash, PrefixCache, PrefixHashes
from pdserve.worker.events import Action, CoordinatorLost, Event, FromCoordinator, OwnerId, Send, SubmitPush
from pdserve.worker.failures import AttemptInUse, attempt_failed
from pdserve.worker.peers import PeerTable
from pdserve.worker.pushes import PushBook

log = logging.getLogger(__name__)

GONE_PEER_GRACE_S: Final = 1.0
"""After a peer's process ended, its last packets may still sit in this host's socket buffers."""
_FIRST_ID: Final = 1 << 40
"""Pushes of prefixes are numbered from here, those of requests from 0."""

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


@dataclass(slots=True, kw_only=True)
class _Departure:
    owner: OwnerId | None
    order: PushPrefix
    book: PushBook
    began: float
    told: bool = False
    """That it failed, or nobody wants to know."""


class PrefixMoves:
    """`handle` takes every event first; what is not only about prefixes is the scheduler's as well."""

    def __init__(
        self,
        worker: WorkerId,
        pool: BlockPool,
        cache: PrefixCache,
        peers: PeerTable,
        layout: GroupLayout,
        draining: Callable[[], bool],
    ) -> None:
        self._worker, self._pool, self._cache, self._peers = worker, pool, cache, peers
        self._layout, self._draining = layout, draining
        self._receipts: dict[AttemptId, _Receipt] = {}
        self._departures: dict[AttemptId, _Departure] = {}
        self._pushes: dict[int, _Departure] = {}
        self._ids = itertools.count(_FIRST_ID)
        self._owners: set[OwnerId] = set()

    def handle(self, event: Event, now: float) -> Handled:
        match event:
            case FromCoordinator(owner, message):
                return self._message(owner, message, now)
            case PushEnded() if event.id >= _FIRST_ID:
                return self._push_ended(event, now), True
            case NoteArrived():
                return self._note(event)
            case PeerFailed():
                return self._peer_lost(event.peer, None, PeerLost(event.peer, event.error)), False
            case CoordinatorLost(owner):
                return self._owner_lost(owner), False
            case _:
                return [], False

    def sweep(self, now: float) -> list[Action]:
        """Leases that ran out, and quarantines whose grace has."""
        for receipt in list(self._receipts.values()):
            if receipt.release_at is not None and receipt.release_at <= now:
                self._release(receipt)
        late = [r for r in self._receipts.values() if not r.ended and r.lease_until <= now]
        return [action for receipt in late for action in self._fail(receipt, _expired(receipt))]

    def next_wake(self) -> float | None:
        times = [r.lease_until for r in self._receipts.values() if not r.ended]
        times += [r.release_at for r in self._receipts.values() if r.release_at is not None]
        return min(times, default=None)

    # --- messages -----------------------------------------------------------------------------------

    def _message(self, owner: OwnerId, message: Message, now: float) -> Handled:
        match message:
            case ReceivePrefix():
                return self._receive(owner, message, now), True
            case PushPrefix():
                return self._push(owner, message, now), True
            case Cancel(attempt=attempt) if attempt in self._receipts or attempt in self._departures:
                return self._cancel(owner, attempt), True
            case PushesSettled(attempt=attempt) if attempt in self._receipts:
                return self._settled(owner, self._receipts[attempt]), True
            case RenewLease(attempt=attempt, lease_s=lease_s) if attempt in self._receipts:
                receipt = self._receipts[attempt]
                if receipt.owner == owner:
                    receipt.lease_until = max(receipt.lease_until, now + lease_s)
                return [], True
            case DropPeer(peer=peer, epoch=epoch):
                lost = PeerLost(peer, "its process is gone")
                actions = self._peer_lost(peer, epoch, lost)
                self._writer_gone(peer, epoch, now)
                return actions, False
            case Hello():
                self._owners.add(owner)
                return [Send(owner, orphan) for orphan in self._orphans()], False
            case _:
                return [], False

    def _cancel(self, owner: OwnerId, attempt: AttemptId) -> list[Action]:
        receipt, departure = self._receipts.get(attempt), self._departures.get(attempt)
        if receipt is not None and not receipt.ended and receipt.owner == owner:
            self._quarantine(receipt)
        if departure is not None and departure.owner in (owner, None):
            # A write under way is not recalled: whoever asks hears of its end.
            departure.owner, departure.told = owner, True
            if departure.book.error is None:
                departure.book.error = "cancelled"
        return []

    def _owner_lost(self, owner: OwnerId) -> list[Action]:
        self._owners.discard(owner)
        for departure in self._departures.values():
            if departure.owner == owner:
                departure.owner = None
        for receipt in self._receipts.values():
            if receipt.owner == owner:
                receipt.owner = None
                if not receipt.ended:
                    self._quarantine(receipt)
        return [Send(other, orphan) for other in sorted(self._owners) for orphan in self._orphans()]

    def _orphans(self) -> list[Orphaned]:
        return [
            Orphaned(attempt=r.attempt, writer=r.writer, writer_epoch=r.writer_epoch)
            for r in self._receipts.values()
            if r.owner is None
        ]

    # --- receiving ----------------------------------------------------------------------------------

    def _receive(self, owner: OwnerId, message: ReceivePrefix, now: float) -> list[Action]:
        attempt, size = message.attempt, self._layout.block_tokens
        known = self._receipts.get(attempt)
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
        cached = self._cached(digests)
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
        self._receipts[message.attempt] = receipt
        return receipt.fresh

    def _note(self, event: NoteArrived) -> Handled:
        try:
            note = decode(event.note)
        except ProtocolError:
            return [], False  # counted by who expects pushes of requests
        if not isinstance(note, PrefixNote):
            return [], False
        receipt = self._receipts.get(note.attempt)
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
        size = self._layout.block_tokens
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

    def _settled(self, owner: OwnerId, receipt: _Receipt) -> list[Action]:
        """A coordinator speaks for its own, and for those whose coordinator is gone."""
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
        del self._receipts[receipt.attempt]
        holder = quarantined_by(receipt.attempt) if receipt.ended else receipt.receiving
        self._pool.release_all(receipt.fresh, holder)
        self._pool.release_all(receipt.cached, receipt.reading)

    # --- sending ------------------------------------------------------------------------------------

    def _push(self, owner: OwnerId, order: PushPrefix, now: float) -> list[Action]:
        attempt, size = order.attempt, self._layout.block_tokens
        if attempt in self._departures:
            return []
        first = order.dst_cached_tokens // size
        blocks = self._cached(PrefixHashes(order.cache_salt, size).of(order.tokens))[: len(order.dst_blocks)]
        error = self._push_error(order, len(blocks))
        if error is not None:
            return [Send(owner, attempt_failed(attempt, error)), Send(owner, PushesSettled(attempt=attempt))]
        departure = _Departure(owner=owner, order=order, book=PushBook(self._pool, attempt), began=now)
        push = Push(
            id=next(self._ids),
            peer=order.worker,
            group=0,
            src_blocks=tuple(blocks[first:]),
            dst_blocks=tuple(order.dst_blocks[first : len(blocks)]),
            layers=(0, self._layout.group.num_layers),
            note=encode(PrefixNote(attempt=attempt, num_tokens=len(blocks) * size)),
            deadline=now + order.transfer_deadline_s,
            flow=str(attempt),
        )
        departure.book.submitted(push, len(push.src_blocks) * self._layout.block_bytes)
        self._departures[attempt] = self._pushes[push.id] = departure
        return [SubmitPush(push)]

    def _push_error(self, order: PushPrefix, num_cached: int) -> PdServeError | None:
        size = self._layout.block_tokens
        known = self._peers.epoch(order.worker)
        if known != order.worker_epoch:
            found = "not connected" if known is None else f"of epoch {known}"
            return PeerLost(order.worker, f"wanted epoch {order.worker_epoch}, it is {found}")
        if order.dst_cached_tokens % size or order.dst_cached_tokens < 0:
            limit = f"a multiple of {size}"
            return InvalidRequest(field="dst_cached_tokens", value=order.dst_cached_tokens, limit=limit)
        if num_cached * size <= order.dst_cached_tokens:
            return Overloaded(f"the prefix of {order.attempt} is not cached on {self._worker} any more")
        return None

    def _push_ended(self, event: PushEnded, now: float) -> list[Action]:
        departure = self._pushes.get(event.id)
        if departure is None:
            return []
        departure.book.ended(event, now)
        actions = [] if departure.book.error is None else self._tell(departure)
        if not event.terminal:
            return actions
        del self._pushes[event.id], self._departures[departure.order.attempt]
        if departure.owner is None:
            return actions  # its landing settles the peer's blocks, or whoever asks about the orphan does
        return [*actions, Send(departure.owner, self._last_word(departure, now))]

    def _tell(self, departure: _Departure) -> list[Action]:
        if departure.told or departure.owner is None:
            return []
        departure.told = True
        error = TransferError(f"push to {departure.order.worker} failed: {departure.book.error}")
        return [Send(departure.owner, attempt_failed(departure.order.attempt, error))]

    def _last_word(self, departure: _Departure, now: float) -> Message:
        order, book = departure.order, departure.book
        if book.error is not None:
            return PushesSettled(attempt=order.attempt)
        return TransferDone(
            attempt=order.attempt,
            bytes_moved=book.bytes_moved,
            exposed_s=now - departure.began,
            busy_s=book.busy_s,
            path=self._peers.path(order.worker).value,
        )

    # --- peers --------------------------------------------------------------------------------------

    def _peer_lost(self, peer: WorkerId, up_to: int | None, error: PdServeError) -> list[Action]:
        """Awaited prefixes of a peer fail; pushes to it end by themselves, as the transport says."""
        hit = [
            receipt
            for receipt in self._receipts.values()
            if receipt.writer == peer
            and not receipt.ended
            and (up_to is None or receipt.writer_epoch <= up_to)
        ]
        return [action for receipt in hit for action in self._fail(receipt, error)]

    def _writer_gone(self, peer: WorkerId, up_to: int, now: float) -> None:
        for receipt in self._receipts.values():
            if receipt.writer == peer and receipt.writer_epoch <= up_to:
                receipt.release_at = now + GONE_PEER_GRACE_S

    def _cached(self, digests: Iterable[BlockHash]) -> list[BlockId]:
        """Blocks of the longest prefix that is cached here, to its end."""
        found = (self._cache.block_of(digest) for digest in digests)
        return [
            block
            for block in itertools.takewhile(lambda block: block is not None, found)
            if block is not None
        ]


def _refused(owner: OwnerId, attempt: AttemptId, reason: RefusalReason, detail: str) -> Action:
    return Send(owner, Refused(attempt=attempt, reason=reason, detail=detail))


def _expired(receipt: _Receipt) -> DeadlineExceeded:
    return DeadlineExceeded(f"attempt {receipt.attempt}: its prefix did not arrive within its lease")
