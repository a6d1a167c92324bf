"""Requests whose prompt this worker reads itself, and whose prefix is on its way from a tier. Pure."""

from __future__ import annotations

from pdserve.core.ids import AttemptId
from pdserve.core.messages import StartDecode
from pdserve.worker.events import OwnerId
from pdserve.worker.tiering import Fetch


class Deferred:
    """They hold no blocks and are not answered yet; each starts as if it had come when its prefix is here."""

    def __init__(self) -> None:
        self._of: dict[AttemptId, tuple[OwnerId, StartDecode, Fetch]] = {}

    def __len__(self) -> int:
        return len(self._of)

    def add(self, owner: OwnerId, message: StartDecode, fetch: Fetch) -> None:
        self._of[message.spec.attempt] = (owner, message, fetch)

    def owner(self, attempt: AttemptId) -> OwnerId | None:
        """Whose it is; None for one that does not wait here."""
        known = self._of.get(attempt)
        return None if known is None else known[0]

    def drop(self, attempt: AttemptId) -> None:
        del self._of[attempt]

    def owner_lost(self, owner: OwnerId) -> None:
        self._of = {attempt: known for attempt, known in self._of.items() if known[0] != owner}

    def take_ready(self) -> list[tuple[OwnerId, StartDecode]]:
        """Those that need not wait any more, in the order in which they came."""
        ready = [(owner, message) for owner, message, fetch in self._of.values() if fetch.done]
        for _, message in ready:
            del self._of[message.spec.attempt]
        return ready
