"""Workers that stand by: loaded, warm, and without requests until another of their model is lost.

    standing by -- another is lost --> stands in, in the lost one's role -- that one is back --> standing by

A worker takes seconds to minutes to start again; one that stands by takes requests as soon as it has heard of
it. To stand by is to be drained: nothing of routing or planning counts such a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.events import ChangeWorkerRole, DrainWorker, Event, NewRequest, UndrainWorker
from coordinator.fleet import Fleet, WorkerState
from coordinator.report import Report
from pdserve.core.errors import PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import FinishReason, Role

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """A worker in use, as it was last seen."""

    model: str
    role: Role
    leaving: bool
    """It was drained: nobody misses it."""


@dataclass(slots=True)
class _Standby:
    model: str
    missed: WorkerId | None = None
    """Whose place it has; None: it stands by."""


class Standbys:
    """A watcher of the dispatcher: looks at the fleet on every tick, four times a second."""

    def __init__(self, wanted: Mapping[str, int]) -> None:
        """wanted: of each model, how many of its decode workers stand by."""
        self._wanted = {model: count for model, count in wanted.items() if count}
        self._in_use: dict[WorkerId, _Known] = {}
        self._standbys: dict[WorkerId, _Standby] = {}

    def arrived(self, samples: Sequence[NewRequest], now: float) -> None:
        """Nothing: requests go to workers in use."""

    def ended(self, report: Report, outcome: FinishReason | PdServeError, now: float) -> None:
        """Nothing."""

    def ticked(self, fleet: Fleet, now: float) -> Sequence[Event]:
        if not self._wanted:
            return ()
        for model, count in self._wanted.items():
            self._choose(fleet, model, count)
        self._see(fleet)
        return [*self._release(fleet), *self._stand_in(fleet), *self._rest(fleet)]

    def stands_by(self, worker: WorkerId) -> bool:
        """It takes no requests, and waits for another to be lost."""
        standby = self._standbys.get(worker)
        return standby is not None and standby.missed is None

    def _choose(self, fleet: Fleet, model: str, count: int) -> None:
        """Once more decode workers are there than stand by: those that drain already, then the idlest."""
        missing = count - sum(standby.model == model for standby in self._standbys.values())
        candidates = [w for w in fleet.of(model, Role.DECODE) if w.id not in self._standbys]
        if missing <= 0 or len(candidates) <= missing:
            return
        candidates.sort(key=lambda w: w.id, reverse=True)
        candidates.sort(key=lambda w: (not w.draining, w.num_placed))
        for worker in candidates[:missing]:
            self._standbys[worker.id] = _Standby(model)
            self._in_use.pop(worker.id, None)

    def _see(self, fleet: Fleet) -> None:
        for worker in fleet:
            if worker.up and worker.id not in self._standbys:
                leaving = worker.draining and worker.role_asked is None
                role = worker.role_asked or worker.info.role
                self._in_use[worker.id] = _Known(worker.model, role, leaving)

    def _release(self, fleet: Fleet) -> Iterator[Event]:
        """Whose missed one is back, and who is lost itself."""
        for name, standby in self._standbys.items():
            if standby.missed is None:
                continue
            worker = fleet.up(name)
            if worker is not None and fleet.up(standby.missed) is None:
                continue
            standby.missed = None
            if worker is not None and (worker.role_asked or worker.info.role) is not Role.DECODE:
                yield ChangeWorkerRole(worker=name, role=Role.DECODE)

    def _stand_in(self, fleet: Fleet) -> Iterator[Event]:
        taken = {standby.missed for standby in self._standbys.values()}
        for missed, known in list(self._in_use.items()):
            if fleet.up(missed) is not None or missed in taken:
                continue
            if known.leaving:
                del self._in_use[missed]
                continue
            worker = self._ready(fleet, known.model)
            if worker is None:
                continue
            self._standbys[worker.id].missed = missed
            log.warning("%s stands in for %s", worker.id, missed)
            yield UndrainWorker(worker=worker.id)
            if worker.info.role is not known.role:
                yield ChangeWorkerRole(worker=worker.id, role=known.role)

    def _ready(self, fleet: Fleet, model: str) -> WorkerState | None:
        up = (worker for name in self._standbys if self.stands_by(name) and (worker := fleet.up(name)))
        return next((worker for worker in up if worker.model == model and worker.role_asked is None), None)

    def _rest(self, fleet: Fleet) -> Iterator[Event]:
        """Those that stand by and take requests: chosen just now, back from standing in, or started again."""
        for name in self._standbys:
            worker = fleet.up(name)
            if worker is not None and self.stands_by(name) and not worker.draining:
                yield DrainWorker(worker=name, timeout_s=None)
