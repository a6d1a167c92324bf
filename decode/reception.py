"""Sequences whose KV a prefill worker writes: what has landed, and when their blocks are safe. Pure.

    wait ---every push landed---> out, whole
      '---ended before that-----> Quarantine ---settled | last push landed | writer gone---> blocks back

A write under way cannot be recalled, so a block is given back only when nothing can reach it any more.
"""

from __future__ import annotations

import logging
from typing import Final

from decode.arrivals import NoteStats, Quarantine
from decode.run import DecodeRun
from kvtransfer.protocol import NoteArrived
from pdserve.core.codec import decode
from pdserve.core.errors import CorruptTransfer, DeadlineExceeded, PdServeError, PeerLost, ProtocolError
from pdserve.core.handover import PushNote
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import Orphaned, PushesSettled
from pdserve.engine.block_pool import BlockPool, quarantined_by
from pdserve.worker.events import OwnerId

log = logging.getLogger(__name__)

GONE_PEER_GRACE_S: Final = 1.0
"""After a peer's process ended, its last packets may still sit in this host's socket buffers."""


class LeaseExpired(DeadlineExceeded):
    """The reservation's own deadline, not the request's: another attempt may do better."""

    retryable = True


class Reception:
    """Owns the awaited blocks of each sequence, from reservation to arrival or to the end of quarantine."""

    def __init__(self, worker: WorkerId, pool: BlockPool, block_tokens: int) -> None:
        self._worker, self._pool, self._block_tokens = worker, pool, block_tokens
        self._runs: dict[AttemptId, DecodeRun] = {}
        self._quarantines: dict[AttemptId, Quarantine] = {}
        self.notes: Final = NoteStats()

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, attempt: AttemptId) -> bool:
        return attempt in self._runs

    def quarantines(self, attempt: AttemptId) -> bool:
        return attempt in self._quarantines

    def wait(self, run: DecodeRun) -> None:
        """All but its cached blocks are held as receiver; those after its tokens become its own."""
        for block in run.blocks[self._awaited(run).stop :]:
            self._pool.rehold(block, run.receiving, run.computing)
        self._runs[run.attempt] = run

    def note(self, event: NoteArrived) -> tuple[DecodeRun, PdServeError | None] | None:
        """A push has landed. The sequence that is whole now, or the one that cannot be any more, and why."""
        try:
            if event.error and not event.note:
                raise ProtocolError(event.error)
            note = decode(event.note)
        except ProtocolError as error:
            self.notes.malformed += 1
            log.error("%s: a push of %s carried no note: %s", self._worker, event.peer, error)
            return None
        match note:
            case PushNote():
                return self._landed(note, event.error)
            case PushesSettled(attempt=attempt):
                return self._given_up(attempt, event.peer)
            case _:
                self.notes.malformed += 1
                log.error("%s: a push of %s carried a %s", self._worker, event.peer, type(note).__name__)
                return None

    def arrived(self, run: DecodeRun) -> None:
        """It is whole: its blocks are for computing now."""
        for block in run.blocks[self._awaited(run)]:
            self._pool.rehold(block, run.receiving, run.computing)
        del self._runs[run.attempt]

    def abandon(self, run: DecodeRun) -> None:
        """It ended before it was whole. What a push may still write is set apart, the rest is given back."""
        assert run.source is not None
        del self._runs[run.attempt]
        awaited = self._awaited(run)
        blocks = run.blocks[awaited]
        self._pool.quarantine(blocks, run.receiving)
        self._pool.release_all(run.blocks[: awaited.start] + run.blocks[awaited.stop :], run.computing)
        self._quarantines[run.attempt] = Quarantine(
            attempt=run.attempt,
            owner=run.owner,
            blocks=blocks,
            prefill_worker=run.source.worker,
            peer_epoch=run.source.epoch,
            arrivals=run.arrivals,
        )
        if run.arrivals.complete or run.settled:
            self.settle(run.attempt)

    def settle(self, attempt: AttemptId) -> None:
        """No write of an abandoned attempt can land any more."""
        quarantine = self._quarantines.pop(attempt, None)
        if quarantine is not None:
            self._pool.release_all(quarantine.blocks, quarantined_by(attempt))

    def may_settle(self, owner: OwnerId, attempt: AttemptId) -> bool:
        """A coordinator speaks for its own attempts, and for those whose coordinator is gone."""
        run, quarantine = self._runs.get(attempt), self._quarantines.get(attempt)
        if run is not None:
            return run.owner == owner
        return quarantine is not None and quarantine.owner in (owner, None)

    @property
    def num_quarantined(self) -> int:
        """Attempts whose blocks a push may still write."""
        return len(self._quarantines)

    def owner_lost(self, owner: OwnerId) -> None:
        for quarantine in self._quarantines.values():
            if quarantine.owner == owner:
                quarantine.owner = None

    def orphans(self) -> list[Orphaned]:
        """Quarantines whose coordinator is gone."""
        return [
            Orphaned(attempt=q.attempt, writer=q.prefill_worker, writer_epoch=q.peer_epoch)
            for q in self._quarantines.values()
            if q.owner is None
        ]

    def renew(self, owner: OwnerId, attempt: AttemptId, until: float) -> None:
        run = self._runs.get(attempt)
        if run is not None and run.owner == owner:
            run.lease_until = max(run.lease_until, until)

    def written_by(self, peer: WorkerId, up_to_epoch: int | None = None) -> list[DecodeRun]:
        """Sequences that wait for a peer, or for its processes up to an epoch."""
        return [
            run
            for run in self._runs.values()
            if run.source is not None
            and run.source.worker == peer
            and (up_to_epoch is None or run.source.epoch <= up_to_epoch)
        ]

    def writer_gone(self, peer: WorkerId, up_to_epoch: int, now: float) -> None:
        """Its process ended: what it could still reach is released after a grace."""
        for quarantine in self._quarantines.values():
            if quarantine.prefill_worker == peer and quarantine.peer_epoch <= up_to_epoch:
                quarantine.release_at = now + GONE_PEER_GRACE_S

    def expired(self, now: float) -> list[tuple[DecodeRun, LeaseExpired]]:
        """Sequences whose lease has run out. Releases quarantines whose grace has."""
        for quarantine in list(self._quarantines.values()):
            if quarantine.release_at is not None and quarantine.release_at <= now:
                self.settle(quarantine.attempt)
        return [
            (run, LeaseExpired(f"attempt {run.attempt}: its KV did not arrive within its lease"))
            for run in self._runs.values()
            if run.lease_until <= now
        ]

    def next_wake(self) -> float | None:
        times = [run.lease_until for run in self._runs.values()]
        times += [q.release_at for q in self._quarantines.values() if q.release_at is not None]
        return min(times, default=None)

    def _landed(self, note: PushNote, wrong: str) -> tuple[DecodeRun, CorruptTransfer | None] | None:
        run = self._runs.get(note.attempt)
        if run is None:
            self._late(note)
            return None
        if not run.arrivals.add(note):
            self.notes.duplicate += 1
            return None
        if wrong:
            self.notes.corrupt += 1
            what = (
                f"attempt {run.attempt}: push {note.sequence} of {run.source and run.source.worker}: {wrong}"
            )
            log.error("%s: %s", self._worker, what)
            return run, CorruptTransfer(what)
        error = run.arrivals.error(run.attempt, len(run.spec.tokens), run.ahead)
        return (run, error) if error is not None or run.arrivals.complete else None

    def _late(self, note: PushNote) -> None:
        """Its attempt ended here, or was never here. What it wrote was in quarantine."""
        quarantine = self._quarantines.get(note.attempt)
        if quarantine is None:
            self.notes.unknown += 1
            log.warning("%s: push %d of unknown attempt %s", self._worker, note.sequence, note.attempt)
            return
        self.notes.late += 1
        log.warning("%s: push %d of %s came after its end", self._worker, note.sequence, note.attempt)
        quarantine.arrivals.add(note)
        if quarantine.arrivals.complete:
            self.settle(note.attempt)

    def _given_up(self, attempt: AttemptId, peer: WorkerId) -> tuple[DecodeRun, PeerLost] | None:
        """A prefill worker whose coordinator is gone says that nothing more is to come."""
        run = self._runs.get(attempt)
        if run is None:
            self.settle(attempt)
            return None
        run.settled = True
        return run, PeerLost(peer, f"it gave up {attempt}, its coordinator is gone")

    def _awaited(self, run: DecodeRun) -> slice:
        """What a peer may write of its block table: after the cached prefix, as far as its tokens may go."""
        return slice(run.remembered, blocks_for(len(run.spec.tokens) + run.ahead, self._block_tokens))
