"""What a transfer is, as plain data, and what every backend promises.

A backend is driven by one thread (`TransferService`); none of its methods is called from two at once.
Completions and arrivals come back as events from `poll`.

    submit ──> queued in the service (requests take turns, bounded bytes under way)
                 │ deadline passes: TIMED_OUT, then CANCELLED at once (no byte has moved)
                 v
               under way in the backend ──> COMPLETED | FAILED
                 │ deadline passes: TIMED_OUT, and its blocks stay in quarantine
                 '──> COMPLETED | FAILED, whenever the transport knows
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import Fingerprint, GroupLayout

if TYPE_CHECKING:
    from kvtransfer.geometry import Route

DEFAULT_INFLIGHT_BYTES: Final = 32 << 20
"""Bytes under way to one peer before further pushes wait in the service's queue."""


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
    """Write layers [layers[0], layers[1]) of the tokens in `src_blocks` into the peer's `dst_blocks`.

    Blocks are in the order of their tokens; between pools of one block size they go pairwise. No block is
    reused before its push is terminal.
    """

    id: int
    peer: WorkerId
    group: int
    src_blocks: tuple[BlockId, ...]
    dst_blocks: tuple[BlockId, ...]
    layers: tuple[int, int]
    note: bytes | None
    """Delivered to the peer after the bytes. None: nothing is."""
    deadline: float
    """On the clock given to the service, seconds."""
    flow: str = ""
    """Pushes to a peer take turns by flow; a request is one."""
    src_token: int = 0
    """The first token's place in `src_blocks[0]`."""
    dst_token: int = 0
    num_tokens: int | None = None
    """None: to the end of the last source block."""
    peer_epoch: int | None = None
    """The process that gave `dst_blocks`: to any other of that peer, nothing is written and the push ends as
    FAILED. None: whichever process is known when it starts."""

    def meant_for(self, epoch: int) -> bool:
        """Whether the peer's process of that epoch is the one it is for."""
        return self.peer_epoch is None or self.peer_epoch == epoch


class Outcome(StrEnum):
    COMPLETED = "completed"
    """The bytes are in the peer's memory. Its note is on the way, and is lost if the peer dies now."""
    FAILED = "failed"
    """Terminal: nothing reads or writes its blocks any more."""
    TIMED_OUT = "timed_out"
    """Past its deadline and NOT terminal: its blocks stay quarantined until a second event ends it."""
    CANCELLED = "cancelled"
    """Terminal, and no byte was written: its deadline passed, or the service stopped, while it waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushEnded:
    """Every push gets exactly one terminal one. `TIMED_OUT` comes at most once, before it.

    `seconds` is from the start of the transfer to its end as seen by the sender.
    """

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
    error: str = ""
    """Its bytes are not those that were sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFailed:
    """The backend noticed that a peer is gone; its pushes end as FAILED by themselves."""

    peer: WorkerId
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PathInfo:
    """The transport of one pair and what a probe measured, once, at connect. None: it could not be probed."""

    path: Path
    gigabytes_per_s: float | None = None
    """Of a 1 MiB write, 1e9 bytes."""
    latency_s: float | None = None
    """Of a 4 KiB write, start to completion at the sender."""

    def __str__(self) -> str:
        large = "" if self.gigabytes_per_s is None else f", 1 MiB at {self.gigabytes_per_s:.2f} GB/s"
        small = "" if self.latency_s is None else f", 4 KiB in {1e6 * self.latency_s:.0f} us"
        return f"{self.path.value}{large}{small}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConnected:
    """`connect` succeeded: pushes to this peer move from now on (those submitted meanwhile waited)."""

    peer: WorkerId
    epoch: int
    path: PathInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStopped:
    """The service's last event: `stop` was called, or `error` says what killed it. Every push has ended."""

    error: str = ""


TransferEvent = PushEnded | NoteArrived | PeerConnected | PeerFailed | TransferStopped


class TransferBackend(Protocol):
    """One transport. Errors of a peer are raised as `TransferError`s or come as events; never swallowed."""

    @property
    def metadata(self) -> bytes:
        """What a peer needs to write here; exchanged out of band by the coordinator."""
        ...

    @property
    def regions(self) -> tuple[PoolRegion, ...]:
        """This worker's pools, one per cache group, in the order of the fingerprint's layouts."""
        ...

    @property
    def wake_fds(self) -> tuple[int, ...]:
        """Descriptors that become readable when `poll` may have something new; fixed for its life."""
        ...

    def max_wait_s(self, now: float) -> float | None:
        """How long `poll` may wait while no `wake_fds` is readable; None: for ever."""
        ...

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        """Meet a peer, or meet its restarted process again; `PeerConnected` or `PeerFailed` follows.

        A second connect with the same epoch is answered by `PeerConnected` again, and revives a failed peer.
        Pushes to an older epoch that are under way stay so until they are terminal or it is disconnected.
        Late news of an older epoch than the known one is ignored, without an event.
        Raises `FingerprintMismatch`, `TransferError` (metadata that does not fit).
        """
        ...

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        """Forget a peer (all of it, or up to `epoch`) whose process is gone for certain.

        Its unfinished pushes end as FAILED. A no-op for a peer that is unknown or newer.
        """
        ...

    def route(self, peer: WorkerId, group: int) -> Route | None:
        """The way from this worker's pool to a peer's; None for a peer that was not met, and for one that
        gets nothing from this rank."""
        ...

    def submit(self, push: Push) -> None:
        """Start a push; its end is an event. To a peer that is unknown, has failed or is another process than
        the push is meant for, it ends as FAILED."""
        ...

    def poll(self, now: float) -> list[TransferEvent]:
        """Make progress and return what happened since the last call."""
        ...

    def path(self, peer: WorkerId) -> PathInfo:
        """Path.UNKNOWN for a peer that is not connected."""
        ...

    def close(self) -> None:
        """Release everything; safe while transfers are unfinished and after peers died.

        Afterwards nothing reads or writes this worker's pools on its behalf.
        """
        ...
