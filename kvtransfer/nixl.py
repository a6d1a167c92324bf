"""Pushes through NIXL: shared memory or TCP between processes on CPUs, NVLink or RDMA between GPUs.

One prepared list per pool, a unit per layer of a block (a head of a grain for a peer of another shape:
`geometry`); NIXL merges neighbours, so whole blocks and runs of
blocks go out as one piece. Naming units takes 48 us for 8 whole blocks of 30 layers and 13 us for 8 layers of
them; describing each push's memory anew, the alternative, took 84 us and 21 us in the same run.

A peer that restarted (higher epoch) is another agent to NIXL; the old one stays until its pushes are terminal
or it is disconnected, because a process that was only stopped may still write what was under way.

Not verified here: pools on a GPU. They are registered as VRAM with their device, and refused when they come
from `expandable_segments`; staging through host memory does not exist.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from kvtransfer.geometry import Route, plan_routes
from kvtransfer.metadata import (
    PeerMetadata,
    RemotePool,
    encode_metadata,
    fingerprint_digest,
    meet,
    remote_pools,
)
from kvtransfer.nixl_agent import AgentError, Memory, NixlAgent, PeerDisconnected, State
from kvtransfer.nixl_peer import Flight, Peer, Phase
from kvtransfer.path import LARGE_BYTES, SMALL_BYTES, Probe, has_rdma, host_identity, slow_path
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
from kvtransfer.scratch import Scratch, require_shareable
from kvtransfer.spans import require_blocks, require_push, require_regions
from pdserve.core.errors import TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.transfer_settings import TcpFallback

log = logging.getLogger(__name__)

TRANSPORT: Final = "nixl"
PROBE_TIMEOUT_S: Final = 2.0
IDLE_WAIT_S: Final = 0.05
"""With descriptors that wake us; only UCX's own keep-alive needs the occasional turn."""
BLIND_WAIT_S: Final = 0.001
"""Where notes may come by RDMA, whose arrival no descriptor shows."""
_NOTE: Final = b"\x01"
"""Goes before every note: NIXL drops empty ones, and other kinds can follow."""


class NixlBackend:
    """See the module, and `TransferBackend` for the contract."""

    def __init__(
        self,
        worker: WorkerId,
        epoch: int,
        regions: Sequence[PoolRegion],
        fingerprint: Fingerprint,
        *,
        ucx: Mapping[str, str],
        tcp_fallback: TcpFallback = TcpFallback.WARN,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Registers `regions`, which must outlive this. Raises `ConfigError`, `TransferError`."""
        require_regions(regions, fingerprint)
        for region in regions:
            if region.device is not None:
                require_shareable(region.address, f"the KV pool of group {region.layout.group.name}")
        self._worker, self._epoch, self._fingerprint = worker, epoch, fingerprint
        self._regions, self._clock = tuple(regions), clock
        self._ucx, self._tcp_fallback = dict(ucx), tcp_fallback
        self._rdma = has_rdma()
        self._scratch = Scratch(LARGE_BYTES, regions[0].device if regions else None)
        self._agent = NixlAgent(f"{worker}@{epoch}", ucx=ucx)
        for region in regions:
            self._agent.register(_memory(region))
        self._lists: dict[tuple[int, int], int] = {}
        scratch = Memory(self._scratch.address, LARGE_BYTES, self._scratch.device)
        self._agent.register(scratch)
        self._scratch_list = self._agent.prepare(None, scratch, SMALL_BYTES)
        self._host = host_identity()
        self._metadata = self._describe()
        self._blind = not self._agent.wake_fds or self._rdma
        self._peers: dict[WorkerId, Peer] = {}
        self._old_peers: list[Peer] = []
        self._events: list[TransferEvent] = []
        self._unreleased: list[int] = []
        self._closed = False

    @property
    def metadata(self) -> bytes:
        return self._metadata

    @property
    def regions(self) -> tuple[PoolRegion, ...]:
        return self._regions

    @property
    def wake_fds(self) -> tuple[int, ...]:
        return self._agent.wake_fds

    def max_wait_s(self, now: float) -> float | None:
        probing = any(peer.phase is Phase.PROBING for peer in self._peers.values())
        return BLIND_WAIT_S if probing or self._blind else IDLE_WAIT_S

    def path(self, peer: WorkerId) -> PathInfo:
        known = self._peers.get(peer)
        return PathInfo(path=Path.UNKNOWN) if known is None else known.path

    # --- peers --------------------------------------------------------------------------------------

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        known = self._peers.get(peer)
        if known is not None and epoch < known.epoch:
            log.info("late news of %s@%d was ignored: %d is known", peer, epoch, known.epoch)
            return
        found = meet(self._fingerprint, peer, epoch, fingerprint, metadata, TRANSPORT)
        if known is not None:
            if epoch == known.epoch and known.phase is not Phase.FAILED:
                if known.phase is Phase.READY:
                    self._events.append(PeerConnected(peer=peer, epoch=epoch, path=known.path))
                return
            self._retire(known)
        self._peers[peer] = self._meet(found, fingerprint)

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        gone = [p for p in self._all_peers() if p.worker == peer and (epoch is None or p.epoch <= epoch)]
        for one in gone:
            self._end_waiting(one, f"{peer} was disconnected")
            for flight in one.flights:
                self._release(flight.handle)
                self._ended(flight, Outcome.FAILED, f"{peer} was disconnected")
            one.flights.clear()
            self._forget(one)

    def _meet(self, found: PeerMetadata, theirs: Fingerprint) -> Peer:
        if found.scratch is None:
            raise TransferError(f"peer {found.worker} offers no scratch memory to probe")
        routes = plan_routes(self._fingerprint, theirs)
        name = self._agent.add_peer(found.agent_metadata)
        lists: list[int] = []
        try:
            for pool, layout, route in zip(found.pools, theirs.layouts, routes, strict=True):
                memory = Memory(pool.address, pool.num_blocks * layout.block_bytes, pool.device)
                unit_bytes = layout.layer_bytes if route is None else route.unit_bytes
                lists.append(self._agent.prepare(name, memory, unit_bytes))
            memory = Memory(found.scratch.address, LARGE_BYTES, found.scratch.device)
            lists.append(self._agent.prepare(name, memory, SMALL_BYTES))
        except AgentError:
            self._drop_agent(name, lists)
            raise
        same_host = bool(self._host) and found.host == self._host
        on_device = self._scratch.device is not None and found.scratch.device is not None
        probe = Probe(
            self._agent,
            self._scratch_list,
            lists[-1],
            same_host=same_host,
            on_device=on_device,
            clock=self._clock,
        )
        both_rdma = self._rdma and found.rdma
        return Peer(found.worker, found.epoch, name, found.pools, routes, lists, probe, same_host, both_rdma)

    def _retire(self, peer: Peer) -> None:
        """A newer process or a fresh connection takes its place; what is under way is seen to its end."""
        self._end_waiting(peer, f"{peer.worker} was connected anew")
        self._keep_probe_handle(peer)
        del self._peers[peer.worker]
        if peer.flights:
            self._old_peers.append(peer)
        else:
            self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        handle = peer.probe.abandon()
        if handle is not None:
            self._release(handle)
        if self._peers.get(peer.worker) is peer:
            del self._peers[peer.worker]
        if peer in self._old_peers:
            self._old_peers.remove(peer)
        self._drop_agent(peer.agent, peer.lists)

    def _drop_agent(self, name: str, lists: Sequence[int]) -> None:
        for handle in lists:
            with contextlib.suppress(AgentError):
                self._agent.unprepare(handle)
        with contextlib.suppress(AgentError):  # NIXL has dropped a dead peer by itself
            self._agent.remove_peer(name)
        self._take_notes(self._agent.drain())

    def _all_peers(self) -> list[Peer]:
        return [*self._peers.values(), *self._old_peers]

    # --- pushes -------------------------------------------------------------------------------------

    def route(self, peer: WorkerId, group: int) -> Route | None:
        known = self._peers.get(peer)
        return known.routes[group] if known is not None and 0 <= group < len(known.routes) else None

    def submit(self, push: Push) -> None:
        peer = self._peers.get(push.peer)
        if peer is None:
            self._refuse(push, f"{push.peer} is not connected")
        elif not push.meant_for(peer.epoch):
            self._refuse(push, f"it is for epoch {push.peer_epoch} of {push.peer}, this is {peer.epoch}")
        elif peer.phase is Phase.FAILED:
            self._refuse(push, peer.error)
        elif peer.phase is Phase.PROBING:
            peer.waiting.append(push)
        else:
            self._start(peer, push)

    def _start(self, peer: Peer, push: Push) -> None:
        handle = None
        began = self._clock()
        note = b"" if push.note is None else _NOTE + push.note
        try:
            route = self._way(peer, push)
            handle = self._make(peer, push, route, note)
            state = self._agent.post(handle, note)
        except PeerDisconnected as error:
            self._events.append(self._push_failed(push, str(error)))
            self._fail_peer(peer, str(error))
        except TransferError as error:
            self._events.append(self._push_failed(push, str(error)))
        else:
            flight = Flight(handle, push, route.size_bytes(push), began)
            if state is State.RUNNING:
                peer.flights.append(flight)
                return
            self._ended(flight, Outcome.COMPLETED)
        if handle is not None:
            self._release(handle)

    def _way(self, peer: Peer, push: Push) -> Route:
        """The push's route, once all of it is in order. Raises `TransferError`."""
        require_push(push, self._regions)
        route = peer.routes[push.group]
        if route is None:
            raise TransferError(f"push {push.id}: this rank holds no heads that {push.peer} takes from it")
        route.require(push)
        require_blocks(push.id, "destination", push.dst_blocks, peer.pools[push.group].num_blocks)
        return route

    def _make(self, peer: Peer, push: Push, route: Route, note: bytes) -> int:
        src, dst = route.units(push)
        return self._agent.write(
            self._own_list(push.group, route.unit_bytes),
            src.astype(np.int32),
            peer.lists[push.group],
            dst.astype(np.int32),
            note,
        )

    def _own_list(self, group: int, unit_bytes: int) -> int:
        """This worker's pool cut into units; each size is prepared once."""
        handle = self._lists.get((group, unit_bytes))
        if handle is None:
            handle = self._agent.prepare(None, _memory(self._regions[group]), unit_bytes)
            self._lists[group, unit_bytes] = handle
        return handle

    def _refuse(self, push: Push, why: str) -> None:
        self._events.append(self._push_failed(push, why))

    def _push_failed(self, push: Push, error: str) -> PushEnded:
        return PushEnded(id=push.id, outcome=Outcome.FAILED, error=error)

    def _end_waiting(self, peer: Peer, why: str) -> None:
        for push in peer.waiting:
            self._refuse(push, why)
        peer.waiting.clear()

    def _ended(self, flight: Flight, outcome: Outcome, error: str = "") -> None:
        if flight.push is not None:
            moved = flight.size_bytes if outcome is Outcome.COMPLETED else 0
            seconds = self._clock() - flight.began
            self._events.append(
                PushEnded(id=flight.push.id, outcome=outcome, bytes_moved=moved, seconds=seconds, error=error)
            )

    # --- progress -----------------------------------------------------------------------------------

    def poll(self, now: float) -> list[TransferEvent]:
        self._take_notes(self._agent.notes())
        for peer in self._all_peers():
            if peer.phase is Phase.PROBING:
                self._step_probe(peer, now)
            if peer.flights:
                self._step_flights(peer)
        events, self._events = self._events, []
        return events

    def _take_notes(self, notes: list[tuple[str, bytes]]) -> None:
        for name, note in notes:
            worker, _, _ = name.rpartition("@")
            if note.startswith(_NOTE):
                self._events.append(NoteArrived(peer=WorkerId(worker), note=note[len(_NOTE) :]))
            else:
                log.warning("a note of an unknown kind from %s was ignored", name)

    def _step_probe(self, peer: Peer, now: float) -> None:
        if peer.probe_until is None:
            peer.probe_until = now + PROBE_TIMEOUT_S
        try:
            path = peer.probe.step()
        except AgentError as error:
            self._fail_peer(peer, str(error))
            return
        if path is None:
            if now < peer.probe_until:
                return
            log.warning("the probe of %s took over %.1f s: path unknown", peer.worker, PROBE_TIMEOUT_S)
            self._keep_probe_handle(peer)
            path = peer.probe.unmeasured()
        if self._refuses(peer, path):
            return
        peer.phase, peer.path = Phase.READY, path
        self._events.append(PeerConnected(peer=peer.worker, epoch=peer.epoch, path=path))
        waiting, peer.waiting = peer.waiting, []
        for push in waiting:
            self.submit(push)

    def _refuses(self, peer: Peer, path: PathInfo) -> bool:
        """A fallback to TCP is never silent, unless it was asked for."""
        wrong = slow_path(path.path, same_host=peer.same_host, both_rdma=peer.both_rdma, ucx=self._ucx)
        if not wrong or self._tcp_fallback is TcpFallback.ALLOW:
            return False
        if self._tcp_fallback is TcpFallback.WARN:
            log.warning("%s to %s: %s (transfer.tcp_fallback)", self._worker, peer.worker, wrong)
            return False
        log.error("%s refuses to move KV to %s: %s", self._worker, peer.worker, wrong)
        self._fail_peer(peer, f"refused by transfer.tcp_fallback=refuse: {wrong}")
        return True

    def _keep_probe_handle(self, peer: Peer) -> None:
        handle = peer.probe.abandon()
        if handle is not None:
            peer.flights.append(Flight(handle, None, 0, self._clock()))

    def _step_flights(self, peer: Peer) -> None:
        flights, peer.flights = peer.flights, []
        for flight in flights:
            try:
                state = self._agent.state(flight.handle)
            except AgentError as error:
                self._release(flight.handle)
                self._ended(flight, Outcome.FAILED, str(error))
                if isinstance(error, PeerDisconnected):
                    self._fail_peer(peer, str(error))
                continue
            if state is State.RUNNING:
                peer.flights.append(flight)
            else:
                self._release(flight.handle)
                self._ended(flight, Outcome.COMPLETED)
        if peer in self._old_peers and not peer.flights:
            self._forget(peer)

    def _fail_peer(self, peer: Peer, error: str) -> None:
        if peer.phase is Phase.FAILED:
            return
        peer.phase, peer.error = Phase.FAILED, f"peer {peer.worker}: {error}"
        self._keep_probe_handle(peer)
        self._end_waiting(peer, peer.error)
        if self._peers.get(peer.worker) is peer:
            self._events.append(PeerFailed(peer=peer.worker, error=peer.error))
        self._take_notes(self._agent.drain())

    def _release(self, handle: int) -> None:
        try:
            self._agent.release(handle)
        except AgentError:  # still active: it is tried again at `close`
            self._unreleased.append(handle)

    # --- the ends -----------------------------------------------------------------------------------

    def _describe(self) -> bytes:
        return encode_metadata(
            PeerMetadata(
                transport=TRANSPORT,
                worker=self._worker,
                epoch=self._epoch,
                host=self._host,
                rdma=self._rdma,
                agent=self._agent.name,
                agent_metadata=self._agent.metadata(),
                pools=remote_pools(self._regions),
                scratch=RemotePool(address=self._scratch.address, num_blocks=1, device=self._scratch.device),
                fingerprint=fingerprint_digest(self._fingerprint),
            )
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._take_notes(self._agent.drain())
        for worker in {peer.worker for peer in self._all_peers()}:
            self.disconnect(worker)
        for handle in self._unreleased:
            with contextlib.suppress(AgentError):
                self._agent.release(handle)
        for handle in (*self._lists.values(), self._scratch_list):
            with contextlib.suppress(AgentError):
                self._agent.unprepare(handle)
        self._agent.drain()
        self._agent.close()


def _memory(region: PoolRegion) -> Memory:
    return Memory(region.address, region.size_bytes, region.device)
