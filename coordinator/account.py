"""What each attempt of a request used and how its time went: for its cost, its trace and its metrics.

A leg is an attempt from its placement to its end, whatever ended it; a request that moved to another decode
worker has one leg on each. Device time is a share of steps: a worker's seconds per token, as its heartbeats
say, times the tokens it computed for the request. So the shares of all requests add up to the workers' busy
time, and idle time is nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pdserve.core.errors import (
    CorruptTransfer,
    DeadlineExceeded,
    Overloaded,
    PdServeError,
    TransferError,
    WorkerLost,
)
from pdserve.core.ids import AttemptId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Heartbeat, Role, TransferDone

if TYPE_CHECKING:
    from coordinator.fleet import Fleet, WorkerState
    from coordinator.flight import Attempt, Flight

_WEIGHT: Final = 0.3
"""Of the newest heartbeat in a worker's pace."""
REASONS: Final = ("lease_expired", "transfer", "corrupt", "worker_lost", "no_room", "other")
"""Why attempts fail, as the metrics have it."""


@dataclass(slots=True)
class Pace:
    """How long a worker computes per token, over the time between two heartbeats."""

    s_per_token: float = 0.0
    _tokens: int = 0
    _busy_s: float = 0.0

    def heard(self, beat: Heartbeat) -> None:
        tokens, busy_s = beat.tokens_computed - self._tokens, beat.busy_s - self._busy_s
        if tokens <= 0:
            return
        self._tokens, self._busy_s = beat.tokens_computed, beat.busy_s
        weight = 1.0 if self.s_per_token == 0.0 else _WEIGHT
        self.s_per_token += weight * (busy_s / tokens - self.s_per_token)


@dataclass(slots=True)
class Marks:
    """When an attempt came to what, on the registry's clock, and how far reading its prompt went."""

    prefill_began: float | None = None
    prefill_ended: float | None = None
    chunks: list[tuple[float, int]] = field(default_factory=list)
    """When each was done, and the prompt tokens done by then."""
    read_from: int = 0
    read_to: int = 0
    arrived: float | None = None
    """Its KV, at the decode worker."""
    outputs_before: int | None = None
    """Output tokens when it began, where that was later than its placement."""

    def read(self, tokens_done: int, now: float) -> None:
        self.read_to = max(self.read_to, tokens_done)
        self.chunks.append((now, tokens_done))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Times on the registry's clock, in seconds; None: it did not come to that."""

    attempt: AttemptId
    decode_worker: str
    prefill_worker: str
    """Empty: the decode worker read the prompt."""
    placed_at: float
    reserved_at: float | None
    prefill_began: float | None
    prefill_ended: float | None
    chunks: tuple[tuple[float, int], ...]
    arrived_at: float | None
    ended_at: float
    prefill_queue_s: float
    transfer: TransferDone | None
    cached_tokens: int
    output_tokens: int
    prefill_device_s: float
    """Times the number of devices."""
    prefill_on: Role
    decode_device_s: float
    decode_on: Role
    kv_byte_s: float
    """KV held at the decode worker, times how long."""
    repeated: bool
    """An earlier attempt had begun to read the prompt."""
    failure: str
    """Why it failed, as the metrics have it; empty when it did not."""


def reason_of(error: PdServeError) -> str:
    """A failed attempt's label: an expiry is not a failure of the transport, nor a damaged one."""
    match error:
        case CorruptTransfer():
            return "corrupt"
        case TransferError():
            return "transfer"
        case DeadlineExceeded():
            return "lease_expired"
        case WorkerLost():
            return "worker_lost"
        case Overloaded():
            return "no_room"
        case _:
            return "other"


def close_leg(fleet: Fleet, flight: Flight, attempt: Attempt, now: float, *, failure: str = "") -> None:
    """Add the leg of an attempt that ends to its request's."""
    marks, history = attempt.marks, flight.record.history
    moved = attempt.read_by is not None
    placed_at = _last(history, Phase.MIGRATING if moved else Phase.ADMITTED)
    reserved_at = _last(history, Phase.DECODING if moved else Phase.PREFILLING)
    if placed_at is None:
        placed_at = flight.record.created
    if reserved_at is not None and reserved_at < placed_at:
        reserved_at = None  # an earlier attempt's
    decode = fleet.get(attempt.decode)
    reader = fleet.get(attempt.prefill) if attempt.prefill is not None else decode
    outputs = len(flight.output) - (attempt.base if marks.outputs_before is None else marks.outputs_before)
    # The first token of an attempt comes from reading the prompt.
    written = max(outputs - (0 if moved else 1), 0)
    held_s = 0.0 if reserved_at is None else now - reserved_at
    flight.legs.append(
        Leg(
            attempt=attempt.id,
            decode_worker=attempt.decode,
            prefill_worker=attempt.prefill or "",
            placed_at=placed_at,
            reserved_at=reserved_at,
            prefill_began=marks.prefill_began,
            prefill_ended=marks.prefill_ended,
            chunks=tuple(marks.chunks),
            arrived_at=marks.arrived,
            ended_at=now,
            prefill_queue_s=0.0 if moved else attempt.prefill_queue_s,
            transfer=None if moved else attempt.transfer,
            cached_tokens=attempt.cached_tokens,
            output_tokens=max(outputs, 0),
            prefill_device_s=_device_s(reader, max(marks.read_to - marks.read_from, 0)),
            prefill_on=Role.DECODE if reader is None else reader.info.role,
            decode_device_s=_device_s(decode, written),
            decode_on=Role.DECODE if decode is None else decode.info.role,
            kv_byte_s=0.0
            if decode is None
            else decode.kv_token_bytes * (flight.num_tokens - outputs / 2) * held_s,
            repeated=bool(flight.legs) and not moved,
            failure=failure,
        )
    )


def _device_s(worker: WorkerState | None, tokens: int) -> float:
    if worker is None or tokens == 0:
        return 0.0
    pace_s = worker.pace.s_per_token
    if pace_s == 0.0 and worker.heartbeat is not None and worker.heartbeat.tokens_per_s > 0:
        pace_s = 1 / worker.heartbeat.tokens_per_s
    return tokens * pace_s * worker.info.num_devices


def _last(history: list[tuple[float, Phase]], wanted: Phase) -> float | None:
    return next((at for at, phase in reversed(history) if phase is wanted), None)
