"""Everything the registry knows, in one place. Only the registry's own modules change it."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.decisions import Decision, DecisionLog, Placement
from coordinator.fleet import Fleet
from coordinator.flight import Attempt, Flight
from coordinator.pushes import PushLedger
from coordinator.router import Router
from coordinator.sla import Goal
from coordinator.waiting import WaitingQueue
from pdserve.core.config import Admission
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import Orphaned


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySettings:
    max_queued_requests: int
    max_attempts: int
    lease_s: float
    transfer_deadline_s: float
    admission: Admission = Admission.OFF
    no_workers_wait_s: float = 30.0
    """How long a request waits for a decode worker to appear (again) while there is none."""
    drain_timeout_s: float = 120.0
    """How long requests of a drained decode worker wait for room elsewhere before they start over."""
    settle_wait_s: float = 0.05
    """How long the end of an answer waits for the figures of its transfer, where they come after it."""


@dataclass(slots=True, kw_only=True)
class Book:
    settings: RegistrySettings
    router: Router
    fleet: Fleet = field(default_factory=Fleet)
    flights: dict[RequestId, Flight] = field(default_factory=dict)
    waiting: dict[str, WaitingQueue] = field(default_factory=dict)
    followers: dict[RequestId, list[RequestId]] = field(default_factory=dict)
    """Samples that wait until the first sample of their prompt has left its KV where they can share it."""
    pushes: PushLedger = field(default_factory=PushLedger)
    ending: dict[RequestId, float] = field(default_factory=dict)
    """Answers whose end waits for the figures of their transfer, and until when."""
    leased: dict[RequestId, float] = field(default_factory=dict)
    """Requests whose decode worker awaits KV, and when their lease was renewed last."""
    orphans: dict[WorkerId, list[tuple[WorkerId, Orphaned]]] = field(default_factory=dict)
    """By who may still write: decode workers with blocks in quarantine, until the writer can be asked."""
    decisions: DecisionLog = field(default_factory=DecisionLog)
    """Why requests went where they went."""
    no_decode_since: dict[str, float] = field(default_factory=dict)
    _gap_s: float = 1.0
    last_end: float | None = None

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.waiting.values())) + sum(map(len, self.followers.values()))

    def enqueue(self, flight: Flight) -> None:
        queue = self.waiting.setdefault(flight.request.model, WaitingQueue())
        queue.push(flight.id, priority=flight.request.priority, order=flight.order)

    def decided(self, flight: Flight, placement: Placement, goal: Goal, now: float) -> None:
        """Keep why, for who asks later."""
        self.decisions.add(
            Decision(
                request=flight.id,
                attempt=flight.record.attempt,
                at=now,
                model=flight.request.model,
                tokens=flight.num_tokens,
                policy=str(self.router.policy),
                ttft_target_s=goal.ttft_s,
                tpot_target_s=goal.tpot_s,
                placement=placement,
            )
        )

    def release(self, attempt: Attempt) -> None:
        """Stop counting an attempt as load of its workers."""
        for worker in {attempt.decode, attempt.prefill}:
            state = self.fleet.get(worker)
            if state is not None:
                state.release(attempt.id)

    def epochs_up(self) -> dict[WorkerId, int]:
        return {worker.id: worker.info.epoch for worker in self.fleet if worker.up}

    def count_end(self, now: float) -> None:
        """How often a place becomes free. The gaps are averaged: the mean of their inverses says too much."""
        if self.last_end is not None:
            self._gap_s += 0.05 * (now - self.last_end - self._gap_s)
        self.last_end = now

    @property
    def ended_per_s(self) -> float:
        """Requests that left their workers, per second of late."""
        return 1 / max(self._gap_s, 1e-4)

    def queue_wait_s(self, model: str, priority: int) -> float:
        """Predicted time until those who wait for a decode worker, and go first, have found one."""
        queue = self.waiting.get(model)
        return 0.0 if queue is None else queue.num_ahead(priority) / self.ended_per_s
