"""Pools with known bytes, and running transfer services, for the tests of kvtransfer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvtransfer.protocol import (
    NoteArrived,
    PeerConnected,
    PeerFailed,
    PoolRegion,
    Push,
    PushEnded,
    TransferBackend,
    TransferEvent,
    TransferStopped,
)
from kvtransfer.service import TransferService
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout

POISON = 0xA5
WAIT_S = 30.0

FULL = GroupLayout(
    group=CacheGroup(name="full", num_layers=6, num_kv_heads=2, head_dim=16, dtype="bfloat16"),
    block_tokens=16,
)
WINDOW = GroupLayout(
    group=CacheGroup(
        name="window", num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32", sliding_window=64
    ),
    block_tokens=16,
)
LAYOUTS = (FULL, WINDOW)


def fingerprint(model: str = "m", layouts: tuple[GroupLayout, ...] = LAYOUTS) -> Fingerprint:
    return Fingerprint(protocol=PROTOCOL_VERSION, model=model, layouts=layouts)


class Pools:
    """Host pools, one per group: filled with random bytes, or with poison."""

    def __init__(
        self,
        layouts: Sequence[GroupLayout],
        num_blocks: int,
        *,
        seed: int | None,
        directory: Path | None = None,
    ) -> None:
        """With a directory the pools are files there, which another process can look into."""
        self.layouts, self.num_blocks = tuple(layouts), num_blocks
        rng = np.random.default_rng(seed)
        self.arrays = []
        for layout in layouts:
            size = num_blocks * layout.block_bytes
            array: np.ndarray = np.empty(size, dtype=np.uint8)
            if directory is not None:
                array = np.memmap(directory / layout.group.name, np.uint8, "w+", shape=(size,))
            array[:] = POISON if seed is None else rng.integers(0, 256, size, dtype=np.uint8)
            self.arrays.append(array)

    @classmethod
    def look(cls, layouts: Sequence[GroupLayout], num_blocks: int, directory: Path) -> Pools:
        """The pools that another process has put into `directory`, as they are now."""
        pools = cls(layouts, 0, seed=None)
        pools.num_blocks = num_blocks
        pools.arrays = [np.memmap(directory / layout.group.name, np.uint8, "r") for layout in layouts]
        return pools

    @property
    def regions(self) -> tuple[PoolRegion, ...]:
        return tuple(
            PoolRegion(
                address=array.ctypes.data,
                size_bytes=array.nbytes,
                layout=layout,
                num_blocks=self.num_blocks,
            )
            for array, layout in zip(self.arrays, self.layouts, strict=True)
        )

    def shaped(self, group: int) -> np.ndarray:
        """[block, layer, bytes of a layer]"""
        layout = self.layouts[group]
        return self.arrays[group].reshape(self.num_blocks, layout.group.num_layers, layout.layer_bytes)


class Events:
    """What a service reported, and a way to wait for it that fails instead of hanging."""

    def __init__(self) -> None:
        self.seen: list[TransferEvent] = []
        self._changed = threading.Condition()

    def __call__(self, event: TransferEvent) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), (
                f"no {what} within {timeout_s} s: {self.seen}"
            )

    def of_push(self, push_id: int) -> list[PushEnded]:
        return [e for e in self.seen if isinstance(e, PushEnded) and e.id == push_id]

    @property
    def notes(self) -> list[bytes]:
        return [e.note for e in self.seen if isinstance(e, NoteArrived)]

    @property
    def failed_peers(self) -> list[WorkerId]:
        return [e.peer for e in self.seen if isinstance(e, PeerFailed)]

    @property
    def connected(self) -> list[tuple[WorkerId, int]]:
        return [(e.peer, e.epoch) for e in self.seen if isinstance(e, PeerConnected)]

    def terminal(self, push_id: int, timeout_s: float = WAIT_S) -> PushEnded:
        self.until(lambda: any(e.terminal for e in self.of_push(push_id)), f"end of {push_id}", timeout_s)
        (end,) = [e for e in self.of_push(push_id) if e.terminal]
        return end

    def await_notes(self, count: int, timeout_s: float = WAIT_S) -> list[bytes]:
        self.until(lambda: len(self.notes) >= count, f"{count} notes", timeout_s)
        return self.notes

    def await_connected(self, peer: str, epoch: int, timeout_s: float = WAIT_S) -> None:
        self.until(lambda: (peer, epoch) in self.connected, f"connection to {peer}@{epoch}", timeout_s)

    def await_stopped(self) -> TransferStopped:
        self.until(lambda: any(isinstance(e, TransferStopped) for e in self.seen), "end of the service")
        assert isinstance(self.seen[-1], TransferStopped)
        return self.seen[-1]


@dataclass
class Node:
    """A worker's side: pools, backend, running service, events."""

    name: WorkerId
    epoch: int
    pools: Pools
    backend: TransferBackend
    service: TransferService
    events: Events
    fingerprint: Fingerprint = field(default_factory=fingerprint)
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def meet(self, other: Node) -> None:
        self.service.connect(other.name, other.epoch, other.fingerprint, other.backend.metadata)
        self.events.await_connected(other.name, other.epoch)

    def push(
        self,
        peer: str,
        src: Sequence[int],
        dst: Sequence[int],
        *,
        layers: tuple[int, int] = (0, FULL.group.num_layers),
        group: int = 0,
        note: bytes = b"note",
        deadline_s: float = WAIT_S,
        flow: str = "",
        peer_epoch: int | None = None,
    ) -> int:
        push = Push(
            id=next(self._ids),
            peer=WorkerId(peer),
            group=group,
            src_blocks=tuple(BlockId(b) for b in src),
            dst_blocks=tuple(BlockId(b) for b in dst),
            layers=layers,
            note=note,
            deadline=time.monotonic() + deadline_s,
            flow=flow,
            peer_epoch=peer_epoch,
        )
        self.service.submit(push)
        return push.id

    def stop(self) -> None:
        self.service.stop()
        assert self.service.join(WAIT_S), "the transfer thread did not end"


NodeMaker = Callable[..., Node]
