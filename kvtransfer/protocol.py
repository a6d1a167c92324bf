"""What a transfer is, as plain data, and what every backend promises.

A backend is driven by one thread (`TransferService`); none of its methods is called from two at once.
Completions and arrivals come back as events from `poll`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import Fingerprint, GroupLayout


class Path(StrEnum):
    """The way the bytes really go."""

    CUDA_IPC = "cuda_ipc"
    RDMA = "rdma"
    SHM = "shm"
    TCP = "tcp"
    LOCAL = "local"
    FAKE = "fake"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRegion:
    """One cache group's pool: a plain allocation that stays where it is. `device` is None for host memory."""

    address: int
    size_bytes: int
    layout: GroupLayout
    num_blocks: int
    device: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Write layers [layers[0], layers[1]) of `src_blocks` into the peer's `dst_blocks`, pairwise.

    `note` is delivered to the peer after the bytes. No block is reused before its push is terminal.
    """

    id: int
    peer: WorkerId
    group: int
    src_blocks: tuple[BlockId, ...]
    dst_blocks: tuple[BlockId, ...]
    layers: tuple[int, int]
    note: bytes
    deadline: float
    """On the clock given to the service, seconds."""


class Outcome(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"
    """Terminal: nothing reads or writes its blocks any more."""
    TIMED_OUT = "timed_out"
    """Past its deadline and NOT terminal: its blocks stay quarantined until a second event ends it."""
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushEnded:
    """`TIMED_OUT` is followed by a second one, COMPLETED or FAILED, when the push is terminal at last."""

    id: int
    outcome: Outcome
    bytes_moved: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def terminal(self) -> bool:
        return self.outcome is not Outcome.TIMED_OUT


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteArrived:
    """A peer's push has landed here, with its note."""

    peer: WorkerId
    note: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFailed:
    """The backend noticed that a peer is gone; its pushes end as FAILED by themselves."""

    peer: WorkerId
    error: str


TransferEvent = PushEnded | NoteArrived | PeerFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class PathInfo:
    """The transport of one pair and what a probe measured, once, at connect."""

    path: Path
    gigabytes_per_s: float | None = None
    latency_s: float | None = None


class TransferBackend(Protocol):
    """One transport. Errors of a peer are raised as `TransferError`s or come as events; never swallowed."""

    @property
    def metadata(self) -> bytes:
        """What a peer needs to write here; exchanged out of band by the coordinator."""
        ...

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        """Meet a peer, or meet its restarted process again. Raises `FingerprintMismatch`, `TransferError`."""
        ...

    def disconnect(self, peer: WorkerId) -> None:
        """Forget a peer that is gone for certain; its unfinished pushes end as FAILED."""
        ...

    def submit(self, push: Push) -> None:
        """Start a push; its end is an event. A push to an unknown peer ends as FAILED."""
        ...

    def poll(self, now: float) -> list[TransferEvent]:
        """Make progress and return what happened since the last call."""
        ...

    def path(self, peer: WorkerId) -> PathInfo: ...

    def close(self) -> None:
        """Release everything; safe while transfers are unfinished and after peers died."""
        ...
