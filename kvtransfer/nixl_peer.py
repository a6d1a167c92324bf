"""What the NIXL backend knows of one peer.

connect ─> PROBING ─> READY ─> FAILED ─(connect again)─> a new `Peer`
             │ pushes wait        '─ pushes fail at once; those under way are asked for their end
             '─ a probe that takes too long: READY, path unknown
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.geometry import Route
from kvtransfer.metadata import RemotePool
from kvtransfer.path import Probe
from kvtransfer.protocol import Path, PathInfo, Push
from pdserve.core.ids import WorkerId


class Phase(Enum):
    PROBING = "probing"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True)
class Flight:
    """A write under way. `push` is None for what is left of a probe."""

    handle: int
    push: Push | None
    size_bytes: int
    began: float


@dataclass(slots=True)
class Peer:
    """One process of a peer: an epoch."""

    worker: WorkerId
    epoch: int
    agent: str
    pools: tuple[RemotePool, ...]
    routes: tuple[Route | None, ...]
    lists: list[int]
    probe: Probe
    same_host: bool
    both_rdma: bool
    phase: Phase = Phase.PROBING
    probe_until: float | None = None
    path: PathInfo = field(default_factory=lambda: PathInfo(path=Path.UNKNOWN))
    error: str = ""
    waiting: list[Push] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
