"""Last words that travel as a push, because the coordinator that would relay them is gone.

Such a push writes a few bytes into a block of the attempt, so until it is terminal a write of the attempt can
still land. Whoever asks meanwhile is answered when it cannot any more.
"""

from __future__ import annotations

from kvtransfer.protocol import Push, PushEnded
from pdserve.core.ids import AttemptId
from pdserve.core.messages import PushesSettled
from pdserve.worker.events import Action, OwnerId, Send, SubmitPush


class LastWords:
    """Those under way from one worker."""

    def __init__(self) -> None:
        self._of: dict[int, AttemptId] = {}
        self._asked: dict[AttemptId, list[OwnerId]] = {}

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._asked

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def attempts(self) -> set[AttemptId]:
        return set(self._asked)

    def say(self, attempt: AttemptId, push: Push) -> SubmitPush:
        self._of[push.id] = attempt
        self._asked.setdefault(attempt, [])
        return SubmitPush(push)

    def ask(self, attempt: AttemptId, owner: OwnerId) -> None:
        """A coordinator wants to know when nothing of `attempt` can land any more."""
        self._asked[attempt].append(owner)

    def ended(self, event: PushEnded) -> list[Action]:
        attempt = self._of.pop(event.id, None) if event.terminal else None
        if attempt is None:
            return []
        return [Send(owner, PushesSettled(attempt=attempt)) for owner in self._asked.pop(attempt)]
