"""One event of many: a push that several ranks or to several ranks send, a note that comes with each part."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvtransfer.protocol import NoteArrived, Outcome, PathInfo, PushEnded
from pdserve.core.ids import WorkerId

_FORGET_NOTES_S: Final = 1800.0
"""Parts of a push that failed elsewhere never become whole; no request waits that long for them."""


@dataclass(slots=True)
class PushJoin:
    """The parts of one push. It is terminal with the last of them, and complete if all are."""

    id: int
    parts: int
    ended: list[PushEnded] = field(default_factory=list)
    timed_out: bool = False

    def add(self, event: PushEnded) -> PushEnded | None:
        """What to say of the whole, if anything."""
        if not event.terminal:
            fresh, self.timed_out = not self.timed_out, True
            return PushEnded(id=self.id, outcome=event.outcome, error=event.error) if fresh else None
        self.ended.append(event)
        return self._whole() if len(self.ended) == self.parts else None

    def _whole(self) -> PushEnded:
        outcomes = {event.outcome for event in self.ended}
        outcome = outcomes.pop() if len(outcomes) == 1 else Outcome.FAILED
        completed = outcome is Outcome.COMPLETED
        return PushEnded(
            id=self.id,
            outcome=outcome,
            bytes_moved=sum(event.bytes_moved for event in self.ended) if completed else 0,
            seconds=max((event.seconds for event in self.ended), default=0.0),
            error=next((event.error for event in self.ended if event.error), ""),
        )


@dataclass(slots=True)
class _Parts:
    began: float
    whose: set[object] = field(default_factory=set)
    error: str = ""


class NoteJoin:
    """Notes that come once from each of several senders, or to each of several ranks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[tuple[WorkerId, bytes], _Parts] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, whose: object, of: int, event: NoteArrived) -> NoteArrived | None:
        """The whole note once its `of` parts are here. event: with the worker as peer, and the note bare."""
        key, now = (event.peer, event.note), self._clock()
        parts = self._waiting.get(key)
        if parts is None:
            self._forget(now)
            parts = self._waiting[key] = _Parts(now)
        parts.whose.add(whose)
        parts.error = parts.error or event.error
        if len(parts.whose) < of:
            return None
        del self._waiting[key]
        return NoteArrived(peer=event.peer, note=event.note, error=parts.error)

    def drop(self, peer: WorkerId) -> None:
        """Its process is gone."""
        for key in [key for key in self._waiting if key[0] == peer]:
            del self._waiting[key]

    def _forget(self, now: float) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            if now - self._waiting[key].began < _FORGET_NOTES_S:
                return
            del self._waiting[key]


def slowest(paths: list[PathInfo]) -> PathInfo:
    """A push is as fast as its slowest part."""
    return min(paths, key=lambda path: path.gigabytes_per_s or 0.0)
