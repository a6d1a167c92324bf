"""Pools of one process: a push is a memory copy. For colocated roles, tests and simulation.

`LocalHub` is the wire: backends enter it under their worker id, and a push finds the other side there.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from kvtransfer.digests import memory
from kvtransfer.geometry import Route, plan_routes
from kvtransfer.metadata import PeerMetadata, encode_metadata, fingerprint_digest, meet, remote_pools
from kvtransfer.protocol import (
    NoteArrived,
    Outcome,
    Path,
    PathInfo,
    PeerConnected,
    PeerFailed,
    PoolRegion,
    Push,
    PushEnded,
    TransferEvent,
)
from kvtransfer.spans import require_blocks, require_push, require_regions
from pdserve.core.errors import ConfigError, PeerLost, TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint


class Port:
    """One backend's place in the hub: its pools, its inbox and the eventfd that says the inbox has grown.

    The lock is held while a peer copies into the pools, so `leave` returns only when nobody does.
    """

    def __init__(self, worker: WorkerId, epoch: int, regions: Sequence[PoolRegion]) -> None:
        self.worker, self.epoch = worker, epoch
        self.lock = threading.Lock()
        self.pools = [memory(region) for region in regions]
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.closed = False
        self._inbox: deque[NoteArrived] = deque()

    def deliver(self, note: NoteArrived) -> None:
        """With the lock held."""
        self._inbox.append(note)
        os.eventfd_write(self.fd, 1)

    def take(self) -> list[NoteArrived]:
        with self.lock:
            if not self._inbox:
                return []
            os.eventfd_read(self.fd)
            notes = list(self._inbox)
            self._inbox.clear()
            return notes

    def leave(self) -> None:
        with self.lock:
            if not self.closed:
                self.closed = True
                self.pools.clear()
                os.close(self.fd)


class LocalHub:
    """Joins the local and fake backends of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ports: dict[WorkerId, Port] = {}

    def enter(self, port: Port) -> None:
        """A higher epoch of a worker takes the place of the one before."""
        with self._lock:
            self._ports[port.worker] = port

    def leave(self, port: Port) -> None:
        with self._lock:
            if self._ports.get(port.worker) is port:
                del self._ports[port.worker]
        port.leave()

    def find(self, worker: WorkerId, epoch: int) -> Port:
        """Raises `PeerLost` when that epoch of the worker is not here (any more)."""
        with self._lock:
            port = self._ports.get(worker)
        if port is None or port.epoch != epoch:
            raise PeerLost(worker, f"no backend of epoch {epoch} in this process")
        return port


class LocalBackend:
    """Copies at `submit`, on the calling thread; the note follows the bytes."""

    PATH: ClassVar[Path] = Path.LOCAL

    def __init__(
        self,
        hub: LocalHub,
        worker: WorkerId,
        epoch: int,
        regions: Sequence[PoolRegion],
        fingerprint: Fingerprint,
    ) -> None:
        require_regions(regions, fingerprint)
        for region in regions:
            if region.device is not None:
                raise ConfigError("the local backend copies host memory; use nixl for pools on a GPU")
        self._hub, self._worker, self._epoch, self._fingerprint = hub, worker, epoch, fingerprint
        self._regions = tuple(regions)
        self._port = Port(worker, epoch, regions)
        self._peers: dict[WorkerId, int] = {}
        self._routes: dict[WorkerId, tuple[Route | None, ...]] = {}
        self._events: list[TransferEvent] = []
        hub.enter(self._port)

    @property
    def metadata(self) -> bytes:
        return encode_metadata(
            PeerMetadata(
                transport=self.PATH,
                worker=self._worker,
                epoch=self._epoch,
                host="",
                rdma=False,
                agent="",
                agent_metadata=b"",
                pools=remote_pools(self._regions),
                scratch=None,
                fingerprint=fingerprint_digest(self._fingerprint),
            )
        )

    @property
    def regions(self) -> tuple[PoolRegion, ...]:
        return self._regions

    @property
    def wake_fds(self) -> tuple[int, ...]:
        return (self._port.fd,)

    def max_wait_s(self, now: float) -> float | None:
        return None

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        known = self._peers.get(peer)
        if known is not None and epoch < known:
            return
        meet(self._fingerprint, peer, epoch, fingerprint, metadata, self.PATH)
        self._hub.find(peer, epoch)
        self._peers[peer] = epoch
        self._routes[peer] = plan_routes(self._fingerprint, fingerprint)
        self._events.append(PeerConnected(peer=peer, epoch=epoch, path=self.path(peer)))

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        known = self._peers.get(peer)
        if known is not None and (epoch is None or known <= epoch):
            del self._peers[peer]

    def route(self, peer: WorkerId, group: int) -> Route | None:
        if peer not in self._peers or not 0 <= group < len(self._regions):
            return None
        return self._routes[peer][group]

    def submit(self, push: Push) -> None:
        started = time.perf_counter()
        try:
            moved = self._write(push)
        except TransferError as error:
            self._fail(push, error)
            return
        self._events.append(
            PushEnded(
                id=push.id,
                outcome=Outcome.COMPLETED,
                bytes_moved=moved,
                seconds=time.perf_counter() - started,
            )
        )

    def poll(self, now: float) -> list[TransferEvent]:
        events, self._events = self._events, []
        events.extend(self._port.take())
        return events

    def path(self, peer: WorkerId) -> PathInfo:
        return PathInfo(path=self.PATH if peer in self._peers else Path.UNKNOWN)

    def close(self) -> None:
        self._peers.clear()
        self._hub.leave(self._port)

    # --- shared with the fake backend ---------------------------------------------------------------

    def _write(self, push: Push) -> int:
        """Copy the bytes, then deliver the note; how many they were. Raises `TransferError`."""
        port = self._target(push)
        with port.lock:
            route = self._copy(push, port)
            self._notify(push, port)
        return route.size_bytes(push)

    def _notify(self, push: Push, port: Port) -> None:
        """With the port's lock held."""
        if push.note is not None:
            port.deliver(NoteArrived(peer=self._worker, note=push.note))

    def _target(self, push: Push) -> Port:
        require_push(push, self._regions)
        epoch = self._peers.get(push.peer)
        if epoch is None:
            raise PeerLost(push.peer, "it is not connected")
        if not push.meant_for(epoch):
            raise TransferError(
                f"push {push.id} is for epoch {push.peer_epoch} of {push.peer}, this is {epoch}"
            )
        port = self._hub.find(push.peer, epoch)
        self._way(push)
        return port

    def _way(self, push: Push) -> Route:
        route = self._routes[push.peer][push.group]
        if route is None:
            raise TransferError(f"push {push.id}: this rank holds no heads that {push.peer} takes from it")
        route.require(push)
        return route

    def _copy(self, push: Push, port: Port) -> Route:
        """With the port's lock held."""
        if port.closed:
            raise PeerLost(push.peer, "it has closed")
        route = self._way(push)
        source, target = self._port.pools[push.group], port.pools[push.group]
        require_blocks(push.id, "destination", push.dst_blocks, len(target) // route.dst.block_bytes)
        for src, dst, length in route.spans(push):
            # numpy copies with the GIL released; ctypes.memmove would hold it
            target[dst : dst + length] = source[src : src + length]
        return route

    def _fail(self, push: Push, error: TransferError) -> None:
        self._events.append(PushEnded(id=push.id, outcome=Outcome.FAILED, error=str(error)))
        if isinstance(error, PeerLost) and self._peers.pop(push.peer, None) is not None:
            self._events.append(PeerFailed(peer=push.peer, error=str(error)))
