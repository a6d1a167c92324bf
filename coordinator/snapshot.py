"""What a coordinator is doing right now, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.registry import Registry
from pdserve.core.ids import WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Heartbeat, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    id: WorkerId
    role: Role
    model: str
    epoch: int
    up: bool
    """False: silent or disconnected; its process has not been seen to end."""
    redialling: bool
    """Its connection ended, and is being made again."""
    draining: bool
    placed: int
    """Attempts that hold a place here."""
    heartbeat: Heartbeat | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSnapshot:
    workers: tuple[WorkerSnapshot, ...]
    active: int
    """Samples that have not ended."""
    waiting: int
    """Of these, waiting for a decode worker."""
    unsettled: int
    """Attempts, also of requests that ended, whose writes may still be in flight."""
    phases: dict[Phase, int]


def take_snapshot(registry: Registry) -> CoordinatorSnapshot:
    workers = tuple(
        WorkerSnapshot(
            id=worker.id,
            role=worker.info.role,
            model=worker.model,
            epoch=worker.info.epoch,
            up=worker.up,
            redialling=worker.redialling,
            draining=worker.draining,
            placed=worker.num_placed,
            heartbeat=worker.heartbeat,
        )
        for worker in sorted(registry.fleet, key=lambda w: w.id)
    )
    return CoordinatorSnapshot(
        workers=workers,
        active=registry.num_active,
        waiting=registry.num_waiting,
        unsettled=registry.num_unsettled,
        phases=registry.phases(),
    )
