"""Two processes with a transfer service each, for measuring what goes on between them."""

from __future__ import annotations

import multiprocessing
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import numpy as np

from benchmarks.network_namespaces import DEVICE, enter, two_namespaces
from kvtransfer.factory import make_backend
from kvtransfer.metadata import decode_metadata
from kvtransfer.protocol import (
    NoteArrived,
    Outcome,
    PathInfo,
    PeerConnected,
    PeerFailed,
    PoolRegion,
    Push,
    PushEnded,
    TransferEvent,
)
from kvtransfer.service import TransferService
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.transfer_settings import TcpFallback, TransferBackendName, Verify

BLOCK_BYTES: Final = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
WAIT_S: Final = 60.0
LOOPBACK: Final = "tcp, loopback"
TWO_NAMESPACES: Final = "tcp, two namespaces"
_STAMP: Final = struct.Struct("<dq")
"""When a push was submitted, and its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """UCX options; and the network namespaces of sender and receiver, if each has one of its own."""

    name: str
    ucx: dict[str, str]
    namespaces: tuple[str, str] | None = None


def layouts() -> tuple[GroupLayout, ...]:
    """A cache group per block size, one layer each."""
    return tuple(
        GroupLayout(
            group=CacheGroup(
                name=f"b{size}", num_layers=1, num_kv_heads=1, head_dim=size // 64, dtype="bfloat16"
            ),
            block_tokens=16,
        )
        for size in BLOCK_BYTES
    )


class Side:
    """A worker's pools and running service; `wait` returns events as they come."""

    def __init__(
        self,
        name: str,
        pool_bytes: int,
        ucx: dict[str, str],
        verify: Verify,
        groups: Sequence[GroupLayout],
    ) -> None:
        self.name = WorkerId(name)
        self.arrays = [np.ones(pool_bytes, dtype=np.uint8) for _ in groups]
        self.fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="benchmark", layouts=tuple(groups))
        regions = [
            PoolRegion(
                address=array.ctypes.data,
                size_bytes=pool_bytes,
                layout=layout,
                num_blocks=pool_bytes // layout.block_bytes,
            )
            for array, layout in zip(self.arrays, groups, strict=True)
        ]
        self.backend = make_backend(
            TransferBackendName.NIXL,
            self.name,
            1,
            regions,
            self.fingerprint,
            ucx=ucx,
            tcp_fallback=TcpFallback.ALLOW,
        )
        self._events: list[TransferEvent] = []
        self._changed = threading.Condition()
        self.notes: dict[int, float] = {}
        """Of each push whose note came: seconds since it was submitted."""
        self._ended_at: dict[int, float] = {}
        self.service = TransferService(self.backend, self._on_event, verify=verify)
        self.service.start()

    def _on_event(self, event: TransferEvent) -> None:
        if isinstance(event, NoteArrived):
            submitted, push_id = _STAMP.unpack(event.note)
            with self._changed:
                self.notes[push_id] = time.monotonic() - submitted
            return
        if isinstance(event, PushEnded):
            self._ended_at[event.id] = time.monotonic()
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def take_notes(self) -> dict[int, float]:
        with self._changed:
            notes, self.notes = self.notes, {}
        return notes

    def wait(self) -> TransferEvent:
        with self._changed:
            if not self._changed.wait_for(lambda: self._events, WAIT_S):
                raise TimeoutError("no transfer event")
            return self._events.pop(0)

    def ended_at(self, push_id: int) -> float:
        """When a push that has ended did so, on the monotonic clock."""
        return self._ended_at[push_id]

    def push(self, push_id: int, group: int, src: Sequence[int], dst: Sequence[int]) -> PushEnded:
        """Submit, and wait for its end."""
        self.submit(push_id, group, src, dst)
        end = self.wait()
        if not isinstance(end, PushEnded) or end.outcome is not Outcome.COMPLETED:
            raise RuntimeError(f"the push failed: {end}")
        return end

    def submit(
        self,
        push_id: int,
        group: int,
        src: Sequence[int],
        dst: Sequence[int],
        flow: str = "",
        layers: tuple[int, int] = (0, 1),
    ) -> None:
        self.service.submit(
            Push(
                id=push_id,
                peer=WorkerId("receiver"),
                group=group,
                src_blocks=tuple(BlockId(b) for b in src),
                dst_blocks=tuple(BlockId(b) for b in dst),
                layers=layers,
                note=_STAMP.pack(time.monotonic(), push_id),
                deadline=time.monotonic() + WAIT_S,
                flow=flow,
            )
        )


def receive(
    pipe: Connection, pool_bytes: int, transport: Transport, verify: Verify, groups: Sequence[GroupLayout]
) -> None:
    """The other process: stands still, and hands over its note times when asked."""
    enter(None if transport.namespaces is None else transport.namespaces[1])
    side = Side("receiver", pool_bytes, transport.ucx, verify, groups)
    pipe.send(side.backend.metadata)
    while pipe.recv() == "notes":
        pipe.send(side.take_notes())
    side.service.stop()
    side.service.join(WAIT_S)


@dataclass(frozen=True, slots=True)
class Pair:
    sender: Side
    pipe: Connection
    receiver_pid: int
    path: PathInfo
    remote_pools: tuple[int, ...]
    """Where the receiver's pools begin, in its memory."""

    def take_notes(self, at_least: int = 0) -> dict[int, float]:
        """Seconds from submit to arrival of the notes since the last call, by push; waits for so many."""
        until, notes = time.monotonic() + WAIT_S, dict[int, float]()
        while True:
            self.pipe.send("notes")
            notes |= self.pipe.recv()
            if len(notes) >= at_least:
                return notes
            if time.monotonic() > until:
                raise TimeoutError(f"{len(notes)} of {at_least} notes came")
            time.sleep(0.01)  # another process's events: nothing wakes us


@contextmanager
def connected(
    transport: Transport,
    pool_bytes: int,
    verify: Verify = Verify.OFF,
    groups: Sequence[GroupLayout] | None = None,
) -> Iterator[Pair]:
    """A sender here and a receiver in a new process, which have met. This process stays in its namespace."""
    groups = layouts() if groups is None else groups
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=receive, args=(theirs, pool_bytes, transport, verify, groups))
    process.start()
    enter(None if transport.namespaces is None else transport.namespaces[0])
    sender = Side("sender", pool_bytes, transport.ucx, verify, groups)
    metadata = pipe.recv()
    sender.service.connect(WorkerId("receiver"), 1, sender.fingerprint, metadata)
    met = sender.wait()
    if not isinstance(met, PeerConnected):
        raise RuntimeError(met.error if isinstance(met, PeerFailed) else str(met))
    assert process.pid is not None
    remote = tuple(pool.address for pool in decode_metadata(metadata).pools)
    yield Pair(sender, pipe, process.pid, met.path, remote)
    pipe.send("stop")
    sender.service.stop()
    sender.service.join(WAIT_S)
    process.join(WAIT_S)


@contextmanager
def transports(*, namespaces: bool) -> Iterator[list[Transport]]:
    on_host = [
        Transport(name="default", ucx={}),
        Transport(name=LOOPBACK, ucx={"TLS": "tcp", "NET_DEVICES": "lo"}),
    ]
    if not namespaces:
        yield on_host
        return
    with two_namespaces() as names:
        ucx = {"TLS": "tcp", "NET_DEVICES": DEVICE}
        yield [*on_host, Transport(name=TWO_NAMESPACES, ucx=ucx, namespaces=names)]
