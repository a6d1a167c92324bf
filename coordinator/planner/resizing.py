"""How a fleet gets as many workers as are wanted: roles change where one has what the other lacks, else
workers are started, or drained and ended.

The coordinator decides; whoever starts processes is a `Scaler`, which says what has become of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from coordinator.events import ChangeWorkerRole, Event
from coordinator.fleet import Fleet, WorkerState
from coordinator.planner.limits import Limits
from coordinator.planner.proposal import Split
from pdserve.core.errors import InvalidRequest
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import PlannerSettings


class ChangeState(StrEnum):
    PLACING = "placing"
    """It waits for room; Ray's autoscaler may bring a node."""
    STARTING = "starting"
    DRAINING = "draining"
    """What it runs moves to others; then it ends."""
    DONE = "done"
    FAILED = "failed"
    """Given up; nothing of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerChange:
    """A worker that is added, or retired."""

    worker: WorkerId
    model: str
    role: Role
    state: ChangeState
    text: str = ""
    """Why it failed."""

    @property
    def ended(self) -> bool:
        return self.state in (ChangeState.DONE, ChangeState.FAILED)

    @property
    def adds(self) -> bool:
        return self.state in (ChangeState.PLACING, ChangeState.STARTING)

    def __str__(self) -> str:
        return f"{self.worker} {self.state.value}{': ' if self.text else ''}{self.text}"


class Scaler(Protocol):
    """Starts and ends the workers of a deployment. All at once: nothing here waits."""

    def devices(self, model: str, role: Role) -> float:
        """What one worker takes: GPUs, or cores where it computes on a CPU."""
        ...

    def add(self, model: str, role: Role) -> WorkerId: ...

    def retire(self, model: str, worker: WorkerId, role: Role) -> None: ...

    def changes(self) -> Sequence[WorkerChange]:
        """Those under way, and the last that ended."""
        ...

    def num_failed(self, model: str) -> int:
        """Starts that were given up, one after the other, since the last that succeeded."""
        ...


class Resizing:
    """Of all models of one coordinator."""

    def __init__(self, scaler: Scaler, settings: PlannerSettings, models: Mapping[str, str]) -> None:
        """models: the served name of each name that clients may ask for."""
        self._scaler, self._settings, self._models = scaler, settings, dict(models)

    def model_named(self, name: str) -> str:
        """The model; an empty name while there is one. Raises `InvalidRequest`."""
        served = sorted(set(self._models.values()))
        if not name and len(served) == 1:
            return served[0]
        if name not in self._models:
            raise InvalidRequest(field="model", value=name, limit=f"one of {', '.join(sorted(self._models))}")
        return self._models[name]

    def changes(self, model: str) -> list[WorkerChange]:
        return [change for change in self._scaler.changes() if change.model == model]

    def busy(self, model: str) -> bool:
        """Workers of it are on their way, or leave."""
        return any(not change.ended for change in self.changes(model))

    def num_failed(self, model: str) -> int:
        return self._scaler.num_failed(model)

    def coming(self, fleet: Fleet, model: str) -> Split:
        """Workers in use, and those on their way."""
        now = in_use(fleet, model)
        more = [
            change.role for change in self.changes(model) if change.adds and fleet.get(change.worker) is None
        ]
        return Split(now.prefill + more.count(Role.PREFILL), now.decode + more.count(Role.DECODE))

    def limits(self, fleet: Fleet, model: str) -> Limits:
        settings, devices = self._settings, self._scaler.devices
        budget = settings.budget_devices
        if budget is not None:
            for other in set(self._models.values()) - {model}:
                split = self.coming(fleet, other)
                budget -= split.prefill * devices(other, Role.PREFILL) + split.decode * devices(
                    other, Role.DECODE
                )
        return Limits(
            min_prefill=settings.min_prefill,
            min_decode=settings.min_decode,
            max_prefill=settings.max_prefill,
            max_decode=settings.max_decode,
            budget_workers=settings.budget_workers,
            budget_devices=budget,
            prefill_devices=devices(model, Role.PREFILL),
            decode_devices=devices(model, Role.DECODE),
        )

    def resize(self, fleet: Fleet, model: str, wanted: Split) -> list[Event]:
        """Begin what leads to `wanted`; what is returned is the registry's to do.

        Raises `InvalidRequest` for what the limits forbid, and while the last change is under way.
        """
        now = in_use(fleet, model)
        refusal = self.limits(fleet, model).refusal(wanted, now)
        if refusal is not None:
            raise InvalidRequest(field="workers", value=str(wanted), limit=f"fewer: {refusal}")
        if self.busy(model):
            under_way = ", ".join(str(c) for c in self.changes(model) if not c.ended)
            raise InvalidRequest(
                field="workers", value=str(wanted), limit=f"the change under way first: {under_way}"
            )
        more = {Role.PREFILL: wanted.prefill - now.prefill, Role.DECODE: wanted.decode - now.decode}
        events: list[Event] = []
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            flips = max(min(more[role], -more[other]), 0)
            events += [
                ChangeWorkerRole(worker=state.id, role=role) for state in idlest(fleet, model, other)[:flips]
            ]
            more[role] -= flips
            more[other] += flips
        for role, missing in more.items():
            for _ in range(missing):
                self._scaler.add(model, role)
            for state in idlest(fleet, model, role)[: max(-missing, 0)]:
                self._scaler.retire(model, state.id, role)
        return events


def in_use(fleet: Fleet, model: str) -> Split:
    """Workers by the role that they have or take up; those that are drained to go do not count."""
    return Split(len(workers_in(fleet, model, Role.PREFILL)), len(workers_in(fleet, model, Role.DECODE)))


def workers_in(fleet: Fleet, model: str, role: Role) -> list[WorkerState]:
    every = [*fleet.of(model, Role.PREFILL), *fleet.of(model, Role.DECODE)]
    return [
        state
        for state in every
        if (state.role_asked or state.info.role) is role and not (state.draining and state.role_asked is None)
    ]


def changing_roles(fleet: Fleet, model: str) -> bool:
    """A worker has been told to take up another role, and has not yet."""
    return any(state.up and state.model == model and state.role_asked is not None for state in fleet)


def idlest(fleet: Fleet, model: str, role: Role) -> list[WorkerState]:
    """Those of a role, the first to go first; of equals the newest."""
    states = sorted(workers_in(fleet, model, role), key=lambda state: _number(state.id), reverse=True)
    if role is Role.DECODE:
        return sorted(states, key=lambda state: len(state.blocks_placed))
    return sorted(states, key=lambda state: state.work_left.tokens)


def _number(worker: WorkerId) -> tuple[int, str]:
    tail = worker.rpartition("-")[2]
    return (int(tail) if tail.isdecimal() else 0, worker)


KEPT_CHANGES: Final = 8
"""That have ended, and are still told of."""
