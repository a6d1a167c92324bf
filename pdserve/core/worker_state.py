"""What workers say of themselves: in every heartbeat blocks, tiers, device and the ways to their peers, and
what their prefix caches hold."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.core.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileStep:
    """A step that a worker measured before it took requests: a prompt that was read whole, or a batch of
    answers."""

    prompt_tokens: int
    """0: none was read."""
    sequences: int
    """Answers; 0: none."""
    context_tokens: int
    """Of all of them together."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """free + held + cached + quarantined == total, always. `cached` are held by the prefix cache alone."""

    total: int
    free: int
    held: int
    cached: int
    quarantined: int

    @property
    def conserved(self) -> bool:
        return self.free + self.held + self.cached + self.quarantined == self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCounts:
    """What lies below a worker's pool: blocks that its prefix cache had to let go of.

    Counters since start, where nothing else is said.
    """

    host_bytes: int = 0
    """Occupied now."""
    disk_bytes: int = 0
    host_hit_tokens: int = 0
    """Brought back into the pool."""
    disk_hit_tokens: int = 0
    bytes_stored: int = 0
    bytes_loaded: int = 0
    dropped_blocks: int = 0
    """Left the lowest tier for want of room."""
    missed_blocks: int = 0
    """Evicted from the pool before they were stored."""
    corrupt_blocks: int = 0
    """Found damaged on disk, and not used."""
    load_bytes_per_s: float = 0.0
    """At which blocks come back into the pool, as measured, in the mix of tiers that they lie in now."""
    io_errors: int = 0
    """Reads and writes of the disk that failed, a full disk included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUsage:
    """Of the device a worker computes on, as the driver or the kernel says."""

    utilisation: float
    """Share of the time it computed, in [0, 1]; on a CPU, of the worker's cores."""
    memory_used_bytes: int
    """On a GPU by everybody, on a CPU by this process."""
    memory_total_bytes: int
    power_w: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairState:
    """The way from the worker that says so to one transfer peer, as it was probed when they met."""

    peer: WorkerId
    path: str
    """cuda_ipc, rdma, shm, tcp, local, fake or unknown."""
    bytes_per_s: float | None
    """Of a large write; None where it could not be probed."""
    latency_s: float | None
    """Of a small one."""
    error: str = ""
    """Why nothing moves there, if that is so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixEvents:
    """Which blocks a worker's prefix cache, and its tiers, began and ceased to hold: to every coordinator, in
    order.

    The first to each is a snapshot. A coordinator that misses a number asks with `SendPrefixes`.
    """

    worker: WorkerId
    epoch: int
    sequence: int
    """One more than that of the events before; a snapshot's may be any."""
    stored: bytes
    """Keys of blocks (`pdserve.core.prefix.pack_keys`); of all that are held, in a snapshot."""
    evicted: bytes
    snapshot: bool
    tier_stored: bytes = b""
    """The same of the tiers below the cache's pool, whether the cache holds these blocks too or not."""
    tier_evicted: bytes = b""
