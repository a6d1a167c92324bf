"""Requests that wait for a decode worker with room, per model, most urgent first."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from pdserve.core.ids import RequestId


class WaitingQueue:
    """Ordered by (priority, order of arrival). A request keeps its place when it comes back after a retry."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, RequestId]] = []
        self._keys: dict[RequestId, tuple[int, int]] = {}
        self._of_priority: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._keys

    def __iter__(self) -> Iterator[RequestId]:
        return iter(list(self._keys))

    def push(self, request: RequestId, *, priority: int, order: int) -> None:
        self.discard(request)
        self._keys[request] = (priority, order)
        self._of_priority[priority] += 1
        heapq.heappush(self._heap, (priority, order, request))

    def peek(self) -> RequestId | None:
        """The most urgent, left in place."""
        while self._heap:
            priority, order, request = self._heap[0]
            if self._keys.get(request) == (priority, order):
                return request
            heapq.heappop(self._heap)  # discarded earlier
        return None

    def discard(self, request: RequestId) -> None:
        """Take it out, if it is there."""
        key = self._keys.pop(request, None)
        if key is not None:
            self._of_priority[key[0]] -= 1

    def num_ahead(self, priority: int) -> int:
        """How many would go before one of this priority that came now."""
        return sum(count for p, count in self._of_priority.items() if p <= priority)
