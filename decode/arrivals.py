"""What has landed of an attempt's KV, and when it is whole.

Notes come in any order, twice, or late; the hand-over on one of them says how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.errors import CorruptTransfer
from pdserve.core.handover import HANDOVER_VERSION, Handover, PushNote
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.worker.events import OwnerId


@dataclass(slots=True)
class Arrivals:
    """Notes of one attempt."""

    _seen: set[int] = field(default_factory=set)
    handover: Handover | None = None

    def add(self, note: PushNote) -> bool:
        """False for one that had come before."""
        if note.sequence in self._seen:
            return False
        self._seen.add(note.sequence)
        if note.handover is not None:
            self.handover = note.handover
        return True

    @property
    def complete(self) -> bool:
        """Every push has landed: no write of this attempt is to come."""
        return self.handover is not None and len(self._seen) >= self.handover.num_pushes

    def error(self, attempt: AttemptId, num_tokens: int, ahead: int = 0) -> CorruptTransfer | None:
        """What is wrong with the hand-over, as soon as it is there. `ahead`: tokens it may bring along."""
        given = self.handover
        if given is None:
            return None
        if given.version != HANDOVER_VERSION:
            wanted, found = f"hand-over version {HANDOVER_VERSION}", f"{given.version}; upgrade one worker"
        elif given.attempt != attempt:
            wanted, found = f"the hand-over of {attempt}", str(given.attempt)
        elif given.num_tokens != num_tokens + len(given.tokens) or len(given.tokens) > ahead:
            wanted = f"KV of {num_tokens} tokens, and of up to {ahead} that come along"
            found = f"of {given.num_tokens}, {len(given.tokens)} of them new"
        elif self._seen and max(self._seen) >= given.num_pushes:
            wanted, found = f"{given.num_pushes} pushes", f"one numbered {max(self._seen)}"
        else:
            return None
        return CorruptTransfer(f"attempt {attempt}: wanted {wanted}, found {found}")


@dataclass(slots=True, kw_only=True)
class Quarantine:
    """Blocks of an attempt that ended before its KV was whole: a push may still write them."""

    attempt: AttemptId
    owner: OwnerId | None
    """None: its coordinator is gone."""
    blocks: list[BlockId]
    prefill_worker: WorkerId
    peer_epoch: int
    arrivals: Arrivals
    release_at: float | None = None
    """Set once the writer is gone: what its last packets hold may land until then."""


@dataclass(slots=True)
class NoteStats:
    """Notes that changed nothing, since start."""

    duplicate: int = 0
    late: int = 0
    """Of an attempt that had ended here; its blocks were still in quarantine."""
    unknown: int = 0
    malformed: int = 0
    corrupt: int = 0
    """Whose bytes were not those that were sent; each fails its attempt."""
