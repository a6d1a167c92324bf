"""Blocks that a decode worker keeps in quarantine for an attempt whose coordinator is gone. Pure.

    Orphaned(D) --> the writer is up: Cancel to it --> its PushesSettled is relayed to D
               |--> that process of the writer has ended: DropPeer to D
               '--> the writer is not there: asked when it joins

Any coordinator may ask: a worker answers for attempts it never saw, and for those that nobody owns any more.
"""

from __future__ import annotations

from coordinator.book import Book
from coordinator.events import Action, Send
from coordinator.fleet import WorkerState
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Cancel, DropPeer, Orphaned


def reported(book: Book, decode: WorkerId, orphan: Orphaned) -> list[Action]:
    """Find out when no write of the attempt can land any more."""
    holder, writer = book.fleet.up(decode), book.fleet.get(orphan.writer)
    if holder is None:
        return []
    if writer is not None and writer.info.epoch > orphan.writer_epoch:
        drop = DropPeer(peer=orphan.writer, epoch=orphan.writer_epoch)
        return [Send(worker=decode, message=drop)]
    if writer is None or not writer.up or writer.info.epoch < orphan.writer_epoch:
        waiting = book.orphans.setdefault(orphan.writer, [])
        if (decode, orphan) not in waiting:
            waiting.append((decode, orphan))
        return []
    if not book.pushes.is_open(orphan.attempt):
        book.pushes.opened(orphan.attempt, writer.id, decode, holder.info.epoch)
    book.pushes.ended_early(orphan.attempt)
    return [Send(worker=writer.id, message=Cancel(attempt=orphan.attempt, reason="its coordinator is gone"))]


def writer_joined(book: Book, writer: WorkerState) -> list[Action]:
    """Ask about everything that waited for it."""
    waiting = book.orphans.pop(writer.id, [])
    return [action for decode, orphan in waiting for action in reported(book, decode, orphan)]
