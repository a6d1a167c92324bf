"""What the console remembers of the last minutes: requests that ended, targets met, and KV that moved."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.events import Event, NewRequest
from coordinator.fleet import Fleet
from coordinator.report import Report
from pdserve.core.errors import PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import FinishReason, Role

WINDOW_S: Final = 300.0
"""What attainment is counted over."""
FLOW_S: Final = 30.0
"""What the rate of transfers is averaged over."""
_MOST: Final = 20_000
"""Ended requests that are kept, whatever the window."""


@dataclass(frozen=True, slots=True)
class Ended:
    at: float
    """On the registry's clock."""
    report: Report
    outcome: str
    """stop, length, abort, or the name of an error."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker that is no more; its successor is on its way."""

    id: WorkerId
    model: str
    role: Role
    seen: float
    """When it was there for the last time."""


@dataclass(slots=True)
class Tally:
    """Requests of one class in the window; those without a target count for neither."""

    requests: int = 0
    failed: int = 0
    ttft_met: int = 0
    ttft_missed: int = 0
    tpot_met: int = 0
    tpot_missed: int = 0


class ConsoleWatch:
    """A watcher of the dispatcher. Work per request, none per token."""

    def __init__(self) -> None:
        self._ended: deque[Ended] = deque(maxlen=_MOST)
        self._seen: dict[WorkerId, Lost] = {}
        self._lost: dict[WorkerId, Lost] = {}

    def arrived(self, samples: Sequence[NewRequest], now: float) -> None:
        """Nothing: who runs is in the registry."""

    def ended(self, report: Report, outcome: FinishReason | PdServeError, now: float) -> None:
        name = type(outcome).__name__ if isinstance(outcome, PdServeError) else outcome.value
        self._ended.append(Ended(now, report, name))

    def ticked(self, fleet: Fleet, now: float) -> Sequence[Event]:
        while self._ended and self._ended[0].at < now - WINDOW_S:
            self._ended.popleft()
        self._look(fleet, now)
        return ()

    def lost(self) -> list[Lost]:
        """Workers that ended without having been drained, and are not back yet; by name."""
        return sorted(self._lost.values(), key=lambda lost: lost.id)

    def _look(self, fleet: Fleet, now: float) -> None:
        here = {worker.id for worker in fleet}
        for gone in self._seen.keys() - here:
            self._lost[gone] = self._seen.pop(gone)
        for worker in fleet:
            self._lost.pop(worker.id, None)
            if worker.draining:
                self._seen.pop(worker.id, None)  # its end is wanted
            else:
                self._seen[worker.id] = Lost(worker.id, worker.model, worker.info.role, now)
        for name in [name for name, lost in self._lost.items() if lost.seen < now - WINDOW_S]:
            del self._lost[name]

    def last(self, count: int) -> list[Ended]:
        """The newest first."""
        return [self._ended[-1 - index] for index in range(min(count, len(self._ended)))]

    def tallies(self) -> dict[tuple[str, str], Tally]:
        """By model and service class."""
        found: dict[tuple[str, str], Tally] = {}
        for ended in self._ended:
            report = ended.report
            tally = found.setdefault((report.model, report.sla_class), Tally())
            tally.requests += 1
            tally.failed += ended.outcome not in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)
            tally.ttft_met += report.ttft_met is True
            tally.ttft_missed += report.ttft_met is False
            tally.tpot_met += report.tpot_met is True
            tally.tpot_missed += report.tpot_met is False
        return found

    def flows(self, now: float) -> dict[tuple[str, str], float]:
        """Bytes per second from one worker to another, of attempts that ended in the last seconds."""
        found: dict[tuple[str, str], float] = {}
        for ended in reversed(self._ended):
            if ended.at < now - FLOW_S:
                break
            for leg in ended.report.legs:
                if leg.transfer is not None and leg.transfer.bytes_moved and leg.prefill_worker:
                    pair = (leg.prefill_worker, leg.decode_worker)
                    found[pair] = found.get(pair, 0.0) + leg.transfer.bytes_moved / FLOW_S
        return found
