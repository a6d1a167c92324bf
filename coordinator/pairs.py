"""Pairs of workers between which KV does not move, although both live: what is avoided is the pair. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pdserve.core.ids import WorkerId

PATIENCE: Final = 2
"""Failures in a row before a pair is avoided: one may have been bad luck."""
FIRST_S: Final = 1.0
LONGEST_S: Final = 60.0
"""It is avoided for so long, twice as long after each further failure; then one request tries it again."""

Pair = tuple[WorkerId, WorkerId]
"""Who pushes, and to whom."""


@dataclass(slots=True)
class _Trouble:
    failures: int = 0
    until: float = 0.0


class PairQuarantine:
    """Remembers failures until the pair works again, or one of the two is gone."""

    def __init__(self) -> None:
        self._troubles: dict[Pair, _Trouble] = {}
        self._now = 0.0

    def failed(self, source: WorkerId, target: WorkerId, now: float) -> float:
        """KV did not get from one to the other. For how many seconds the pair is avoided from now on."""
        trouble = self._troubles.setdefault((source, target), _Trouble())
        if now < trouble.until:
            return trouble.until - now  # it was under way when the pair was found bad
        trouble.failures += 1
        if trouble.failures < PATIENCE:
            return 0.0
        seconds: float = min(FIRST_S * 2 ** (trouble.failures - PATIENCE), LONGEST_S)
        trouble.until = now + seconds
        return seconds

    def worked(self, source: WorkerId, target: WorkerId) -> None:
        if self._troubles:
            self._troubles.pop((source, target), None)

    def forget(self, worker: WorkerId) -> None:
        """Another process, or none, has its place: what went wrong says nothing of it."""
        for pair in [pair for pair in self._troubles if worker in pair]:
            del self._troubles[pair]

    def at(self, now: float) -> None:
        """What `avoids` answers for."""
        self._now = now

    def avoids(self, source: WorkerId, target: WorkerId) -> bool:
        if not self._troubles:
            return False
        trouble = self._troubles.get((source, target))
        return trouble is not None and self._now < trouble.until

    def bad(self) -> list[Pair]:
        """Pairs that are avoided now."""
        return [pair for pair, trouble in self._troubles.items() if self._now < trouble.until]
