"""How long each phase of a worker's start took, from what it says on its way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pdserve.core.ids import WorkerId
from pdserve.worker.hosting import Progress

log = logging.getLogger(__name__)


class StartPhase(StrEnum):
    PROCESS = "process"
    """Ray makes the process, which imports what it needs."""
    RANKS = "ranks"
    """It waits for the other ranks of its worker."""
    COPY = "copy"
    """The checkpoint is copied to the machine's own disk."""
    KERNELS = "kernels"
    """CPU kernels are compiled, once per machine."""
    WEIGHTS = "weights"
    """The configuration and the layers are read."""
    MATRICES = "matrices"
    """The fastest matrix products of this machine are chosen."""
    KV_CACHE = "kv_cache"
    """Memory for KV is taken."""
    GRAPHS = "graphs"
    """Decode steps are recorded, on a GPU."""
    TRANSFER = "transfer"
    """Memory is registered for transfers, and sockets are opened."""
    OTHER = "other"


_BY_FIRST_WORD: Final[Mapping[str, StartPhase]] = {
    "starting": StartPhase.PROCESS,
    "waiting": StartPhase.RANKS,
    "copying": StartPhase.COPY,
    "compiling": StartPhase.KERNELS,
    "reading": StartPhase.WEIGHTS,
    "loading": StartPhase.WEIGHTS,
    "choosing": StartPhase.MATRICES,
    "allocating": StartPhase.KV_CACHE,
    "recording": StartPhase.GRAPHS,
    "engine": StartPhase.TRANSFER,
    "registering": StartPhase.TRANSFER,
}
READY: Final = Progress(fraction=1.0, text="ready")
OnStarted = Callable[[WorkerId, Mapping[str, float]], None]
"""With the seconds of each `StartPhase`."""


def phase_of(text: str) -> StartPhase:
    """By the first word of what a worker says."""
    return _BY_FIRST_WORD.get(text.partition(" ")[0], StartPhase.OTHER)


@dataclass(slots=True)
class _Start:
    phase: StartPhase
    since: float
    seconds: dict[str, float] = field(default_factory=dict)


class StartTimes:
    """Hears every worker's progress; tells its phases when it is ready, and logs them."""

    def __init__(self, on_started: OnStarted, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_started, self._clock = on_started, clock
        self._starts: dict[WorkerId, _Start] = {}

    def told(self, worker: WorkerId, progress: Progress) -> None:
        """A start that fails is never ready; the next one of that name begins anew."""
        now, phase = self._clock(), phase_of(progress.text)
        start = self._starts.get(worker)
        if progress == READY:
            if start is not None:
                self._count(start, now)
                del self._starts[worker]
                self._ended(worker, start.seconds)
        elif start is None or phase is StartPhase.PROCESS:
            self._starts[worker] = _Start(phase, now)
        else:
            self._count(start, now)
            start.phase = phase

    def _count(self, start: _Start, now: float) -> None:
        start.seconds[start.phase] = start.seconds.get(start.phase, 0.0) + now - start.since
        start.since = now

    def _ended(self, worker: WorkerId, seconds: Mapping[str, float]) -> None:
        parts = ", ".join(f"{phase} {took:.2f}" for phase, took in seconds.items())
        log.info("%s started in %.2f s: %s", worker, sum(seconds.values()), parts)
        self._on_started(worker, seconds)
