"""Requests of one model that wait for a decode worker with room: most urgent first, tenants in fair turns.

Inside a priority, tenants share by weight, as in start-time fair queueing (P. Goyal, H. Vin, H. Cheng, 1996):
a request's tag is when it would begin if its tenant had its share of a machine to itself, and the lowest tag
goes first. One tenant alone is served in the order of arrival.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from pdserve.core.ids import RequestId

_TENANTS: Final = 1024
"""Of one priority, before those are forgotten whose turn is over."""
_PRIORITIES: Final = 64
"""Before those are forgotten that nobody waits with."""

Key = tuple[int, float, int]
"""Priority, tag, order of arrival."""


@dataclass(slots=True)
class _Turns:
    """Of one priority. Virtual time is in tokens per unit of weight."""

    now: float = 0.0
    """The highest tag that was served."""
    ends: dict[str, float] = field(default_factory=dict)
    """By tenant: when what it asked for so far would have been served."""
    waiting: int = 0

    def tag(self, tenant: str, tokens: float) -> float:
        if not self.waiting:  # nobody was kept waiting: the past does not count
            self.now = max(self.now, max(self.ends.values(), default=0.0))
            self.ends.clear()
        elif len(self.ends) > _TENANTS:
            self.ends = {name: end for name, end in self.ends.items() if end > self.now}
        begin = max(self.now, self.ends.get(tenant, 0.0))
        self.ends[tenant] = begin + tokens
        return begin


class WaitingQueue:
    """Ordered by (priority, tag, order of arrival). A request keeps its place when it comes back."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, RequestId]] = []
        self._keys: dict[RequestId, Key] = {}
        self._tenant_of: dict[RequestId, str] = {}
        self._of_tenant: Counter[str] = Counter()
        self._turns: dict[int, _Turns] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._keys

    def __iter__(self) -> Iterator[RequestId]:
        return iter(list(self._keys))

    def tag(self, priority: int, tenant: str, tokens: float, *, weight: float = 1.0) -> float:
        """The place of a new request of so many tokens, prompt and expected answer, among its priority's."""
        return self._of(priority).tag(tenant, tokens / weight)

    def settle(self, priority: int, tenant: str, tokens: float, *, weight: float = 1.0) -> None:
        """A request turned out to be so much longer than was expected; below zero: shorter."""
        ends = self._of(priority).ends
        if tenant in ends:
            ends[tenant] += tokens / weight

    def push(
        self, request: RequestId, *, priority: int, order: int, tag: float = 0.0, tenant: str = ""
    ) -> None:
        self.discard(request)
        key = (priority, tag, order)
        self._keys[request], self._tenant_of[request] = key, tenant
        self._of_tenant[tenant] += 1
        self._of(priority).waiting += 1
        heapq.heappush(self._heap, (key, request))

    def first(self, count: int) -> list[RequestId]:
        """The first `count` in turn."""
        return [request for _, request in heapq.nsmallest(count, self._by_key())]

    def _by_key(self) -> Iterator[tuple[Key, RequestId]]:
        return ((key, request) for request, key in self._keys.items())

    def peek(self) -> RequestId | None:
        """The first in turn, left in place."""
        while self._heap:
            key, request = self._heap[0]
            if self._keys.get(request) == key:
                return request
            heapq.heappop(self._heap)  # discarded earlier
        return None

    def take(self, request: RequestId) -> None:
        """It is served: the turns go on from it."""
        key = self._keys.get(request)
        self.discard(request)
        if key is not None:
            turns = self._of(key[0])
            turns.now = max(turns.now, key[1])

    def discard(self, request: RequestId) -> None:
        """Take it out, if it is there."""
        key = self._keys.pop(request, None)
        if key is None:
            return
        self._of(key[0]).waiting -= 1
        if len(self._turns) > _PRIORITIES:
            self._turns = {priority: turns for priority, turns in self._turns.items() if turns.waiting}
        tenant = self._tenant_of.pop(request)
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]

    def num_ahead(self, priority: int) -> int:
        """How many would go before one of this priority that came now."""
        return sum(turns.waiting for p, turns in self._turns.items() if p <= priority)

    def num_of(self, tenant: str) -> int:
        """How many of a tenant's wait."""
        return self._of_tenant[tenant]

    def less_urgent(self, priority: int) -> list[RequestId]:
        """Who waits with a less urgent priority, the last in turn first."""
        if all(p <= priority or not turns.waiting for p, turns in self._turns.items()):
            return []
        late = [entry for entry in self._by_key() if entry[0][0] > priority]
        return [request for _, request in sorted(late, reverse=True)]

    def _of(self, priority: int) -> _Turns:
        turns = self._turns.get(priority)
        if turns is None:
            turns = self._turns[priority] = _Turns()
        return turns
