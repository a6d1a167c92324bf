"""Workers are added and retired while a deployment serves: `coordinator.planner.resizing.Scaler` over Ray.

add      placing -- no room in time --> failed
            '--> starting -- it does not start: twice more, in another place --> failed
                    '--> done: registered, supervised like any other
retire   draining: what it runs moves to others with its KV --> its process ends --> its place goes back
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, Protocol

from coordinator.planner.resizing import KEPT_CHANGES, ChangeState, WorkerChange
from pdserve.cluster.placement import WorkerSlot
from pdserve.core.errors import CheckpointError, ConfigError, PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

log = logging.getLogger(__name__)

_TRIES: Final = 3
"""A node may die while a worker starts there; the next one is tried."""


class Host(Protocol):
    """`pdserve.cluster.ray_host.RayHost`, as far as places go."""

    @property
    def slots(self) -> tuple[WorkerSlot, ...]: ...
    @property
    def leaving(self) -> tuple[WorkerSlot, ...]: ...
    def add_slot(self, role: Role, model: int) -> WorkerSlot: ...
    async def place(self, slot: WorkerSlot, timeout_s: float) -> None: ...
    def retires(self, slot: WorkerSlot) -> None: ...
    def give_back(self, slot: WorkerSlot) -> None: ...
    def devices(self, role: Role, model: int) -> float: ...


class Team(Protocol):
    """`pdserve.cluster.supervisor.Supervisor` of one model."""

    async def add(self, slot: WorkerSlot) -> None: ...
    async def retire(self, worker: WorkerId, timeout_s: float | None = None) -> None: ...


class ClusterScaler:
    def __init__(self, host: Host, teams: Mapping[str, Team], *, place_timeout_s: float) -> None:
        """teams: by model, in the order of the configuration."""
        self._host, self._place_timeout_s = host, place_timeout_s
        self._teams = dict(teams)
        self._models = {name: index for index, name in enumerate(teams)}
        self._changes: dict[WorkerId, WorkerChange] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: dict[str, int] = {}

    def go_on(self) -> None:
        """End the workers that were being retired when the launcher before this one was killed."""
        names = list(self._models)
        for slot in self._host.leaving:
            self.retire(names[slot.model], slot.worker, slot.role)

    async def stop(self) -> None:
        """Give up what is under way. Workers that run are their supervisors' to end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until nothing is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def devices(self, model: str, role: Role) -> float:
        return self._host.devices(role, self._models[model])

    def changes(self) -> Sequence[WorkerChange]:
        return tuple(self._changes.values())

    def num_failed(self, model: str) -> int:
        return self._failed.get(model, 0)

    def add(self, model: str, role: Role) -> WorkerId:
        slot = self._host.add_slot(role, self._models[model])
        self._tell(slot, model, role, ChangeState.PLACING)
        self._start(self._add(model, slot), f"add-{slot.worker}")
        return slot.worker

    def retire(self, model: str, worker: WorkerId, role: Role) -> None:
        slot = next((slot for slot in self._host.slots if slot.worker == worker), None)
        if slot is not None:
            self._tell(slot, model, role, ChangeState.DRAINING)
            self._start(self._retire(model, slot, role), f"retire-{worker}")

    async def _add(self, model: str, slot: WorkerSlot) -> None:
        for tries_left in reversed(range(_TRIES)):
            with contextlib.ExitStack() as undo:
                undo.callback(self._host.give_back, slot)
                try:
                    await self._host.place(slot, self._place_timeout_s)
                    self._tell(slot, model, slot.role, ChangeState.STARTING)
                    await self._teams[model].add(slot)
                except (PdServeError, OSError) as error:
                    failure = error
                else:
                    undo.pop_all()
                    self._failed[model] = 0
                    self._tell(slot, model, slot.role, ChangeState.DONE, "it is in use")
                    return
            # What the configuration or the cluster cannot give, it cannot give in another place either.
            if not tries_left or isinstance(failure, (ConfigError, CheckpointError)):
                self._failed[model] = self.num_failed(model) + 1
                self._tell(slot, model, slot.role, ChangeState.FAILED, str(failure))
                return
            log.warning("%s did not start, and is tried again as another: %s", slot.worker, failure)
            del self._changes[slot.worker]
            slot = self._host.add_slot(slot.role, slot.model)
            self._tell(slot, model, slot.role, ChangeState.PLACING)

    async def _retire(self, model: str, slot: WorkerSlot, role: Role) -> None:
        self._host.retires(slot)
        await self._teams[model].retire(slot.worker)
        self._host.give_back(slot)
        self._tell(slot, model, role, ChangeState.DONE, "it has ended")

    def _tell(self, slot: WorkerSlot, model: str, role: Role, state: ChangeState, text: str = "") -> None:
        change = WorkerChange(worker=slot.worker, model=model, role=role, state=state, text=text)
        self._changes.pop(slot.worker, None)  # the newest comes last
        self._changes[slot.worker] = change
        log.log(logging.ERROR if state is ChangeState.FAILED else logging.WARNING, "%s: %s", model, change)
        ended = [name for name, one in self._changes.items() if one.ended]
        for name in ended[:-KEPT_CHANGES]:
            del self._changes[name]

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
