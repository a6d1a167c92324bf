"""One rank's transfers: peers, pushes and notes of whole workers, in terms of ranks.

    on prefill-0/1 (heads 2 3)
        a push to decode-0 ---> head 2 to decode-0/2
                          '---> head 3 to decode-0/3

A worker of one rank is called as its rank is, and between two of these nothing is changed. Else each note
says from how many ranks it comes; it is told when all of them have written.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgpack

from kvtransfer.geometry import plan_routes
from kvtransfer.protocol import (
    NoteArrived,
    Outcome,
    PathInfo,
    PeerConnected,
    PeerFailed,
    Push,
    PushEnded,
    TransferEvent,
)
from pdserve.core.errors import TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.worker.ports import TransferPort
from pdserve.worker.ranks.joining import NoteJoin, PushJoin, slowest
from pdserve.worker.ranks.names import rank_id, worker_of

OnEvent = Callable[[TransferEvent], None]

_MARK: Final = b"\xc1"  # the one byte that msgpack never writes: no note begins with it
_FIRST_PART_ID: Final = 1 << 48
"""Above the ids of pushes that go as they are."""


@dataclass(slots=True)
class _Peer:
    epoch: int
    targets: list[tuple[WorkerId, int]]
    """Ranks that take heads of this one, and from how many ranks each takes some."""
    links: list[WorkerId]
    """Ranks that this one writes to, or that write to it."""
    plain: bool
    waiting: set[WorkerId] = field(default_factory=set)
    paths: list[PathInfo] = field(default_factory=list)


class RankTransfer:
    """`TransferPort` of one rank, around the service of its own pool. Events name workers, not ranks."""

    def __init__(
        self, make_service: Callable[[OnEvent], TransferPort], ours: Fingerprint, on_event: OnEvent
    ) -> None:
        self._ours, self._on_event = ours, on_event
        self._lock = threading.Lock()
        self._peers: dict[WorkerId, _Peer] = {}
        self._joins: dict[int, PushJoin] = {}
        """By the id of each part."""
        self._notes = NoteJoin()
        self._part_ids = itertools.count(_FIRST_PART_ID)
        self._service = make_service(self._handle)

    def start(self) -> None:
        self._service.start()

    def stop(self) -> None:
        self._service.stop()

    def join(self, timeout_s: float | None = None) -> bool:
        return self._service.join(timeout_s)

    def submit(self, push: Push) -> None:
        with self._lock:
            peer = self._peers.get(push.peer)
            parts = [push] if peer is None or peer.plain else self._parts(push, peer)
        for part in parts:
            self._service.submit(part)
        if not parts:
            self._on_event(PushEnded(id=push.id, outcome=Outcome.COMPLETED))

    def _parts(self, push: Push, peer: _Peer) -> list[Push]:
        joined = PushJoin(push.id, len(peer.targets))
        parts = []
        for target, senders in peer.targets:
            note = None if push.note is None else _MARK + bytes([senders]) + push.note
            part = dataclasses.replace(push, id=next(self._part_ids), peer=target, note=note)
            self._joins[part.id] = joined
            parts.append(part)
        return parts

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        """metadata: as `pack_metadata` made it."""
        if self._ours.tp_size == fingerprint.tp_size == 1:
            with self._lock:
                self._peers[peer] = _Peer(epoch, [], [peer], plain=True)
            self._service.connect(peer, epoch, fingerprint, metadata)
            return
        try:
            self._ours.require_transferable(fingerprint, peer=peer)
            parts = unpack_metadata(metadata, fingerprint.tp_size)
        except TransferError as error:
            self._on_event(PeerFailed(peer=peer, error=str(error)))
            return
        ranks = [dataclasses.replace(fingerprint, tp_rank=rank) for rank in range(fingerprint.tp_size)]
        found = self._ways(peer, epoch, ranks)
        with self._lock:
            known = self._peers.get(peer)
            if known is not None and epoch < known.epoch:
                return
            self._peers[peer] = found
        for rank, part in zip(ranks, parts, strict=True):
            name = rank_id(peer, rank.tp_rank, rank.tp_size)
            if name in found.links:
                self._service.connect(name, epoch, rank, part)

    def _ways(self, peer: WorkerId, epoch: int, ranks: list[Fingerprint]) -> _Peer:
        us = [dataclasses.replace(self._ours, tp_rank=rank) for rank in range(self._ours.tp_size)]
        targets, links = [], []
        for rank in ranks:
            name = rank_id(peer, rank.tp_rank, rank.tp_size)
            if _leads(self._ours, rank):
                targets.append((name, sum(_leads(one, rank) for one in us)))
            if _leads(self._ours, rank) or _leads(rank, self._ours):
                links.append(name)
        return _Peer(epoch, targets, links, plain=False, waiting=set(links))

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        with self._lock:
            known = self._peers.get(peer)
            if known is not None and (epoch is None or known.epoch <= epoch):
                del self._peers[peer]
                self._notes.drop(peer)
        for name in [peer] if known is None else known.links:
            self._service.disconnect(name, epoch)

    # --- the transfer thread ------------------------------------------------------------------------

    def _handle(self, event: TransferEvent) -> None:
        whole = self._translated(event)
        if whole is not None:
            self._on_event(whole)

    def _translated(self, event: TransferEvent) -> TransferEvent | None:
        with self._lock:
            match event:
                case PushEnded(id=part) if part in self._joins:
                    joined = self._joins.pop(part) if event.terminal else self._joins[part]
                    return joined.add(event)
                case NoteArrived() if event.note[:1] == _MARK:
                    bare = dataclasses.replace(event, peer=worker_of(event.peer), note=event.note[2:])
                    return self._notes.add(event.peer, event.note[1], bare)
                case NoteArrived():
                    return dataclasses.replace(event, peer=worker_of(event.peer))
                case PeerConnected():
                    return self._connected(event)
                case PeerFailed():
                    return dataclasses.replace(event, peer=worker_of(event.peer))
                case _:
                    return event

    def _connected(self, event: PeerConnected) -> PeerConnected | None:
        worker = worker_of(event.peer)
        peer = self._peers.get(worker)
        if peer is None or peer.plain:
            return event
        if peer.epoch != event.epoch:
            return None
        peer.waiting.discard(event.peer)
        peer.paths.append(event.path)
        return (
            None if peer.waiting else PeerConnected(peer=worker, epoch=event.epoch, path=slowest(peer.paths))
        )


def pack_metadata(ranks: list[bytes]) -> bytes:
    """What the ranks of a worker tell its peers, in order, as the one thing that its `WorkerInfo` carries."""
    if len(ranks) == 1:
        return ranks[0]
    packed: bytes = msgpack.packb(ranks)
    return packed


def unpack_metadata(metadata: bytes, size: int) -> list[bytes]:
    """Raises `TransferError` unless it is that of `size` ranks."""
    if size == 1:
        return [metadata]
    try:
        ranks = msgpack.unpackb(metadata)
    except (ValueError, msgpack.UnpackException) as error:
        raise TransferError(f"the metadata of {size} ranks cannot be read: {error}") from error
    if not isinstance(ranks, list) or len(ranks) != size or not all(isinstance(r, bytes) for r in ranks):
        raise TransferError(f"wanted the metadata of {size} ranks")
    return ranks


def _leads(src: Fingerprint, dst: Fingerprint) -> bool:
    return any(route is not None for route in plan_routes(src, dst))
