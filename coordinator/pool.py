"""Workers of one model and role, and the ways in which policies draw some of them without looking at all.

Small pools are looked at whole, so that every decision can be explained with everyone in it. In large ones a
draw costs the same whatever their size: a random sample, the next in turn by name, or the least loaded from a
heap that is mended where a worker's load has changed.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pdserve.core.ids import WorkerId

if TYPE_CHECKING:
    from coordinator.fleet import WorkerState

WHOLE: Final = 16
"""Pools of up to this many workers are looked at whole."""
SAMPLE: Final = 8
"""Drawn from larger ones. The best of d draws is within log log n / log d of the best of all (Azar et al.,
"Balanced Allocations", 1999)."""

_NOBODY: Final[tuple[int, None]] = (0, None)

Fits = Callable[["WorkerState"], bool]


class Pool:
    def __init__(self, load: Callable[[WorkerState], float]) -> None:
        """load: what the least loaded has the least of, before a request is added."""
        self.workers: list[WorkerState] = []
        """In order of names, also those that are down."""
        self._load = load
        self._heap: list[tuple[float, WorkerId, int]] = []
        self._entry: dict[WorkerId, tuple[int, WorkerState]] = {}
        """Number of each worker's newest entry in the heap; entries with another number are out of date."""
        self._changed: dict[WorkerId, WorkerState] = {}
        self._count = 0
        self._by_size: list[WorkerState] | None = None

    def add(self, state: WorkerState) -> None:
        bisect.insort(self.workers, state, key=_name)
        self._by_size = None
        state.on_change = self._changed.__setitem__
        self._changed[state.id] = state

    def forget(self, state: WorkerState) -> None:
        self.workers[:] = [other for other in self.workers if other is not state]
        self._by_size = None
        state.on_change = None
        self._changed.pop(state.id, None)
        self._entry.pop(state.id, None)

    def up(self) -> list[WorkerState]:
        return [state for state in self.workers if state.up]

    def first_up(self, count: int) -> list[WorkerState]:
        """By name."""
        return list(itertools.islice((state for state in self.workers if state.up), count))

    def largest_up(self) -> WorkerState | None:
        """With the most room for KV, the first by name of several."""
        if self._by_size is None:
            self._by_size = sorted(
                self.workers, key=lambda w: w.info.num_blocks * w.info.block_tokens, reverse=True
            )
        return next((state for state in self._by_size if state.up), None)

    def find(self, name: WorkerId) -> WorkerState | None:
        at = bisect.bisect_left(self.workers, name, key=_name)
        found = at < len(self.workers) and self.workers[at].id == name
        return self.workers[at] if found else None

    def all(self, fits: Fits) -> list[WorkerState]:
        return [state for state in self.workers if fits(state)]

    def any(self, fits: Fits) -> bool:
        return any(map(fits, self.workers))

    def sample(self, count: int, rng: random.Random, fits: Fits) -> list[WorkerState]:
        """Everyone who fits in a small pool, else up to `count` of them, by name. Someone, if anyone fits."""
        if len(self.workers) <= WHOLE:
            return self.all(fits)
        size = len(self.workers)
        for _ in range(2):
            places = {int(rng.random() * size) for _ in range(count)}
            drawn = [state for place in sorted(places) if fits(state := self.workers[place])]
            if drawn:
                return drawn
        fitting = self.all(fits)
        return fitting if len(fitting) <= count else sorted(rng.sample(fitting, count), key=_name)

    def after(self, name: WorkerId, fits: Fits) -> list[WorkerState]:
        """Everyone who fits in a small pool, else the next one after `name`, beginning again at the end."""
        if len(self.workers) <= WHOLE:
            return self.all(fits)
        begin = bisect.bisect_right(self.workers, name, key=_name)
        for index in range(len(self.workers)):
            state = self.workers[(begin + index) % len(self.workers)]
            if fits(state):
                return [state]
        return []

    def least(self, count: int, fits: Fits, *, thorough: bool = True) -> list[WorkerState]:
        """Everyone who fits in a small pool, else the `count` least loaded of them.

        thorough: everyone is looked at where none of the least loaded fits; otherwise nobody is found then.
        """
        if len(self.workers) <= WHOLE:
            return self.all(fits)
        self._mend()
        found: list[WorkerState] = []
        taken: list[tuple[float, WorkerId, int]] = []
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            number, state = self._entry.get(entry[1], _NOBODY)
            if state is None or number != entry[2]:
                continue
            taken.append(entry)
            if fits(state):
                found.append(state)
            elif len(taken) >= (4 * count if thorough else count):
                break
        for entry in taken:
            heapq.heappush(self._heap, entry)
        if found or not thorough:
            return found
        return heapq.nsmallest(count, self.all(fits), key=self._load)

    def _mend(self) -> None:
        for state in self._changed.values():
            self._count += 1
            self._entry[state.id] = (self._count, state)
            heapq.heappush(self._heap, (self._load(state), state.id, self._count))
        self._changed.clear()
        if len(self._heap) > 4 * len(self.workers):
            self._heap = [e for e in self._heap if self._entry.get(e[1], _NOBODY)[0] == e[2]]
            heapq.heapify(self._heap)


def _name(state: WorkerState) -> WorkerId:
    return state.info.worker
