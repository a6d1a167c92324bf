"""Virtual time: what is due next, in the order of (time, the order in which it was scheduled)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Final

Act = Callable[[float], None]
"""Called with the time it was due."""


class Clock:
    """A heap for what is due at any time, and a queue for what is due after the one delay of the network.

    Half of all events of a simulation are messages under way: they come in the order in which they were sent,
    so they need no heap.
    """

    def __init__(self, *, network_s: float) -> None:
        """network_s: one way between coordinator and worker."""
        self.now = 0.0
        self.events = 0
        self._network_s: Final = network_s
        self._heap: list[tuple[float, int, Act]] = []
        self._wire: deque[tuple[float, int, Act]] = deque()
        self._order = 0

    def at(self, at: float, act: Act) -> None:
        self._order += 1
        heapq.heappush(self._heap, (at, self._order, act))

    def sent(self, act: Act) -> None:
        """Now, to be received after the delay of the network."""
        self._order += 1
        self._wire.append((self.now + self._network_s, self._order, act))

    def step(self) -> bool:
        """Let time pass to the next event, and have it happen. False when there is none."""
        heap, wire = self._heap, self._wire
        if wire and (not heap or wire[0] < heap[0]):
            self.now, _, act = wire.popleft()
        elif heap:
            self.now, _, act = heapq.heappop(heap)
        else:
            return False
        self.events += 1
        act(self.now)
        return True
