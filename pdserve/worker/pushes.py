"""The pushes of one attempt, whoever sends them: which are under way, and the blocks they read.

A block is held as sender from its first push under way to the end of its last one. One push that is past its
deadline but not terminal puts its blocks into quarantine until it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtransfer.protocol import Outcome, Push, PushEnded
from pdserve.core.ids import AttemptId, BlockId
from pdserve.engine.block_pool import BlockPool, Holder, HolderKind, quarantined_by


@dataclass(slots=True)
class PushBook:
    """The pushes of one attempt."""

    pool: BlockPool
    attempt: AttemptId
    num_submitted: int = 0
    bytes_planned: int = 0
    bytes_moved: int = 0
    busy_s: float = 0.0
    """Summed over pushes, as the transfer thread measured them: this thread hears of ends between steps."""
    last_end: float | None = None
    error: str | None = None
    """Of the first push that did not complete."""
    _live: dict[int, Push] = field(default_factory=dict)
    _pushes_of: dict[BlockId, int] = field(default_factory=dict)
    _quarantined: set[BlockId] = field(default_factory=set)

    @property
    def settled(self) -> bool:
        """Every push so far is terminal."""
        return not self._live

    def submitted(self, push: Push, size_bytes: int) -> None:
        self._live[push.id] = push
        self.num_submitted += 1
        self.bytes_planned += size_bytes
        for block in push.src_blocks:
            if block not in self._pushes_of:
                self.pool.hold(block, self._sender)
            self._pushes_of[block] = self._pushes_of.get(block, 0) + 1

    def ended(self, event: PushEnded, now: float) -> None:
        """Note an outcome; blocks are given back by terminal ones only."""
        push = self._live.get(event.id)
        if push is None:
            return
        if event.outcome is not Outcome.COMPLETED and self.error is None:
            self.error = event.error or event.outcome.value
        if not event.terminal:
            fresh = [block for block in push.src_blocks if block not in self._quarantined]
            self.pool.quarantine(fresh, self._sender)
            self._quarantined.update(fresh)
            return
        del self._live[event.id]
        self.bytes_moved += event.bytes_moved
        self.busy_s += event.seconds
        for block in push.src_blocks:
            self._give_back(block)
        if not self._live:
            self.last_end = now

    @property
    def _sender(self) -> Holder:
        return Holder(HolderKind.SENDER, self.attempt)

    def _give_back(self, block: BlockId) -> None:
        self._pushes_of[block] -= 1
        if self._pushes_of[block]:
            return
        del self._pushes_of[block]
        if block in self._quarantined:
            self._quarantined.remove(block)
            self.pool.release(block, quarantined_by(self.attempt))
        else:
            self.pool.release(block, self._sender)
