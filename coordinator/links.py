"""How fast KV moves between two workers, and how much of it is under way: measured, never assumed. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from pdserve.core.ids import AttemptId, WorkerId

MAX_PAIRS: Final = 65_536
"""Remembered, the last ones that moved something; a few hundred bytes each."""
_NEWEST: Final = 0.2
"""Weight of the newest transfer in a pair's moving average."""

Pair = tuple[WorkerId, WorkerId]
"""Who pushes, and to whom."""


class Links:
    def __init__(self) -> None:
        self._rates: OrderedDict[Pair, float] = OrderedDict()
        self._of_source: dict[WorkerId, float] = {}
        self._under_way: dict[WorkerId, dict[AttemptId, int]] = {}

    def moved(self, source: WorkerId, target: WorkerId, size_bytes: int, busy_s: float) -> None:
        """A transfer ended that took so long in all."""
        if size_bytes <= 0 or busy_s <= 0:
            return
        rate, pair = size_bytes / busy_s, (source, target)
        known = self._rates.pop(pair, rate)
        self._rates[pair] = known + _NEWEST * (rate - known)
        mean = self._of_source.get(source, rate)
        self._of_source[source] = mean + _NEWEST * (rate - mean)
        if len(self._rates) > MAX_PAIRS:
            self._rates.popitem(last=False)

    def begun(self, source: WorkerId, attempt: AttemptId, size_bytes: int) -> None:
        """A prompt has been read, and this much of its KV may still be on its way."""
        self._under_way.setdefault(source, {})[attempt] = size_bytes

    def ended(self, source: WorkerId, attempt: AttemptId) -> None:
        sending = self._under_way.get(source)
        if sending is not None:
            sending.pop(attempt, None)

    def bytes_per_s(self, source: WorkerId, target: WorkerId) -> float | None:
        """Of this pair; where it has moved nothing yet, of the source to others; None where that neither."""
        return self._rates.get((source, target)) or self._of_source.get(source)

    def bytes_under_way(self, source: WorkerId) -> int:
        sending = self._under_way.get(source)
        return sum(sending.values()) if sending else 0

    def relative(self, source: WorkerId, target: WorkerId) -> float:
        """How many times as long as its transfers on average one of `source` takes to this target."""
        rate, mean = self._rates.get((source, target)), self._of_source.get(source)
        return mean / rate if rate and mean else 1.0

    def wait_s(self, source: WorkerId, target: WorkerId) -> float:
        """Until what `source` is sending now is through."""
        size_bytes = self.bytes_under_way(source)
        rate = self.bytes_per_s(source, target) if size_bytes else None
        return size_bytes / rate if rate else 0.0

    def forget(self, worker: WorkerId) -> None:
        """Another process, or none, has its place."""
        for pair in [pair for pair in self._rates if worker in pair]:
            del self._rates[pair]
        self._of_source.pop(worker, None)
        self._under_way.pop(worker, None)
