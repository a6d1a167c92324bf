"""Pushes between simulated processes: what flies, what is lost, and what has arrived of it."""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.protocol import (
    NoteArrived,
    Outcome,
    Path,
    PathInfo,
    PeerConnected,
    PeerFailed,
    Push,
    PushEnded,
)
from pdserve.core.ids import WorkerId
from pdserve.core.messages import ConnectPeer
from pdserve.engine.block_pool import HolderKind
from tests.support.simulated_process import Process


@dataclass(slots=True, eq=False)
class Flight:
    """A push under way, between two processes."""

    sender: Process
    target: Process
    push: Push
    timed_out: bool = False
    """The sender has been told so; the write may come all the same."""


class Transfers:
    """What the transfer services of all processes do. Their events wait in the inboxes."""

    def __init__(self) -> None:
        self.flying: list[Flight] = []
        self.lost: list[Flight] = []
        """Neither their bytes nor their end will ever come, while both processes live."""
        self.notes: list[tuple[Process, Process, bytes]] = []

    def connect(self, process: Process, peer: ConnectPeer, target: Process | None) -> None:
        """target: who answers under that name now."""
        if target is None or target.info.epoch != peer.epoch:
            process.inbox.append(PeerFailed(peer=peer.peer, error="nobody answers"))
            return
        process.peers[peer.peer] = target
        info = PathInfo(path=Path.FAKE)
        process.inbox.append(PeerConnected(peer=peer.peer, epoch=peer.epoch, path=info))

    def submit(self, process: Process, push: Push, target: Process | None) -> None:
        met = process.peers.get(push.peer)
        if met is None or met is not target or not push.meant_for(met.info.epoch):
            process.inbox.append(PushEnded(id=push.id, outcome=Outcome.FAILED))
        else:
            self.flying.append(Flight(process, target, push))

    def disconnect(self, process: Process, peer: WorkerId, epoch: int) -> None:
        if peer in process.peers and process.peers[peer].info.epoch <= epoch:
            del process.peers[peer]
        for flights in (self.flying, self.lost):
            for flight in list(flights):
                target = flight.target.info
                if flight.sender is process and target.worker == peer and target.epoch <= epoch:
                    flights.remove(flight)
                    process.inbox.append(PushEnded(id=flight.push.id, outcome=Outcome.FAILED))

    def end_with(self, process: Process) -> None:
        """It is gone: nothing of it writes any more, and nobody writes into it."""
        for flights in (self.flying, self.lost):
            for flight in flights:
                if flight.target is process and flight.sender is not process:
                    flight.sender.inbox.append(PushEnded(id=flight.push.id, outcome=Outcome.FAILED))
            flights[:] = [f for f in flights if process not in (f.sender, f.target)]
        self.notes = [note for note in self.notes if note[1] is not process]

    def end_push(self, index: int, how: str) -> None:
        """how: lands, fails, fails halfway, fails after landing, is lost."""
        flight = self.flying.pop(index % len(self.flying))
        if how == "is lost":
            self.lost.append(flight)
            return
        if how != "fails":
            _write(flight)
        if how in ("lands", "fails after landing") and flight.push.note is not None:
            self.notes.append((flight.sender, flight.target, flight.push.note))
        outcome = Outcome.COMPLETED if how == "lands" else Outcome.FAILED
        flight.sender.inbox.append(PushEnded(id=flight.push.id, outcome=outcome))

    def arrive(self, index: int, *, again: bool) -> None:
        """A note arrives; `again`: and will once more."""
        sender, target, note = self.notes.pop(index % len(self.notes))
        if again:
            self.notes.append((sender, target, note))
        target.inbox.append(NoteArrived(peer=sender.id, note=note))

    def expire(self, now: float) -> int:
        """Tell senders whose deadline has passed; returns how many."""
        late = [f for f in self.flying + self.lost if f.push.deadline <= now and not f.timed_out]
        for flight in late:
            flight.timed_out = True
            flight.sender.inbox.append(PushEnded(id=flight.push.id, outcome=Outcome.TIMED_OUT))
        return len(late)


def _write(flight: Flight) -> None:
    """The bytes arrive: whose blocks are they?"""
    for block in flight.push.dst_blocks:
        kinds = {holder.kind for holder in flight.target.shared.pool.holders(block)}
        waiting = kinds & {HolderKind.RECEIVER, HolderKind.QUARANTINE}
        assert waiting, f"{flight.push} wrote over block {block} of {kinds or 'nobody'}"
