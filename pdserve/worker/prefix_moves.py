"""Prefixes that move from one worker's cache into another's, apart from any request. Pure; for both roles.

    ReceivePrefix --blocks--> awaited --PrefixNote--> the cache's
                                 '--ended before that--> quarantine --settled | landed | writer gone--> back
    PushPrefix --what is cached here by now--> one push --its end--> TransferDone | PushesSettled

The same contract as for a prompt's KV: a block that a write may still reach is nobody else's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvtransfer.protocol import NoteArrived, PeerFailed, Push, PushEnded
from pdserve.core.codec import encode
from pdserve.core.errors import (
    InvalidRequest,
    Overloaded,
    PdServeError,
    PeerLost,
    TransferError,
)
from pdserve.core.handover import PrefixNote
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import GroupLayout
from pdserve.core.messages import (
    Cancel,
    DropPeer,
    Hello,
    Message,
    PushesSettled,
    PushPrefix,
    ReceivePrefix,
    RenewLease,
    TransferDone,
)
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.prefix_cache import PrefixCache, PrefixHashes
from pdserve.worker.events import Action, CoordinatorLost, Event, FromCoordinator, OwnerId, Send, SubmitPush
from pdserve.worker.failures import attempt_failed
from pdserve.worker.peers import PeerTable
from pdserve.worker.prefix_receipts import Handled, PrefixReceipts
from pdserve.worker.pushes import PushBook

_FIRST_ID: Final = 1 << 40
"""Pushes of prefixes are numbered from here, those of requests from 0."""


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
        self._layout = layout
        self._receipts = PrefixReceipts(worker, pool, cache, peers, layout.block_tokens, draining)
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
                return self._receipts.note(event)
            case PeerFailed():
                return self._receipts.peer_lost(event.peer, None, PeerLost(event.peer, event.error)), False
            case CoordinatorLost(owner):
                return self._owner_lost(owner), False
            case _:
                return [], False

    def sweep(self, now: float) -> list[Action]:
        """Leases that ran out, and quarantines whose grace has."""
        return self._receipts.sweep(now)

    def next_wake(self) -> float | None:
        return self._receipts.next_wake()

    # --- messages -----------------------------------------------------------------------------------

    def _message(self, owner: OwnerId, message: Message, now: float) -> Handled:
        match message:
            case ReceivePrefix():
                return self._receipts.receive(owner, message, now), True
            case PushPrefix():
                return self._push(owner, message, now), True
            case Cancel(attempt=attempt) if attempt in self._receipts or attempt in self._departures:
                return self._cancel(owner, attempt), True
            case PushesSettled(attempt=attempt) if attempt in self._receipts:
                return self._receipts.settled(owner, attempt), True
            case RenewLease(attempt=attempt, lease_s=lease_s) if attempt in self._receipts:
                self._receipts.renew(owner, attempt, now + lease_s)
                return [], True
            case DropPeer(peer=peer, epoch=epoch):
                lost = PeerLost(peer, "its process is gone")
                actions = self._receipts.peer_lost(peer, epoch, lost)
                self._receipts.writer_gone(peer, epoch, now)
                return actions, False
            case Hello():
                self._owners.add(owner)
                return [Send(owner, orphan) for orphan in self._receipts.orphans()], False
            case _:
                return [], False

    def _cancel(self, owner: OwnerId, attempt: AttemptId) -> list[Action]:
        departure = self._departures.get(attempt)
        if attempt in self._receipts:
            self._receipts.cancel(owner, attempt)
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
        self._receipts.owner_lost(owner)
        orphans = self._receipts.orphans()
        return [Send(other, orphan) for other in sorted(self._owners) for orphan in orphans]

    # --- sending ------------------------------------------------------------------------------------

    def _push(self, owner: OwnerId, order: PushPrefix, now: float) -> list[Action]:
        attempt, size = order.attempt, self._layout.block_tokens
        if attempt in self._departures:
            return []
        first = order.dst_cached_tokens // size
        blocks = self._cache.beginning(PrefixHashes(order.cache_salt, size).of(order.tokens))[
            : len(order.dst_blocks)
        ]
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
            peer_epoch=order.worker_epoch,
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
