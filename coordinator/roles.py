"""A worker takes up another role: it is drained of the old one, told, and counted among the new one's.

ChangeWorkerRole -> draining, ChangeRole -> its answers move away, its prompts are read -> RoleChanged
                 -> counted in the new role, introduced to its new peers, takes requests again
"""

from __future__ import annotations

from coordinator import endings
from coordinator.book import Book
from coordinator.events import Action, ChangeWorkerRole, Send
from coordinator.fleet import WorkerState
from pdserve.core.messages import ChangeRole, Role, RoleChanged


def change(book: Book, event: ChangeWorkerRole, now: float) -> list[Action]:
    """Begin. Nothing happens where it has the role already, or is no more."""
    state = book.fleet.up(event.worker)
    if state is None or event.role is (state.role_asked or state.info.role):
        return []
    timeout_s = book.settings.drain_timeout_s if event.timeout_s is None else event.timeout_s
    book.roles_given[event.worker] = event.role
    state.drain_until = now + timeout_s
    return _tell(state, event.role)


def _tell(state: WorkerState, role: Role) -> list[Action]:
    state.role_asked = role
    state.draining = state.drain_asked = True
    return [Send(worker=state.id, message=ChangeRole(role=role))]


def changed(book: Book, message: RoleChanged) -> list[Action]:
    """Nothing of the old role is left on it."""
    state = book.fleet.up(message.worker, message.epoch)
    if state is None or state.role_asked is not message.role:
        return []
    state.role_asked, state.drain_until = None, None
    state.draining = state.drain_asked = False
    if message.role is state.info.role:
        return []
    book.fleet.change_role(state, message.role)
    if message.role is Role.DECODE:
        book.no_decode_since.pop(state.model, None)
    actions: list[Action] = []
    for peer in _peers_of(book, state):
        actions += endings.introductions(state.info, peer.info)
    return actions


def joined(book: Book, state: WorkerState, known: WorkerState | None) -> list[Action]:
    """Its connection was made again: what it said of its role may have been lost, so it is asked again. A
    successor is started in the role that its predecessor began with, and takes up the one it had last."""
    if known is not None and known.info.epoch == state.info.epoch:
        if known.role_asked is None:
            return []
        state.role_asked = known.role_asked
        return [Send(worker=state.id, message=ChangeRole(role=known.role_asked))]
    given = book.roles_given.get(state.id)
    return [] if given in (None, state.info.role) else _tell(state, given)


def _peers_of(book: Book, state: WorkerState) -> list[WorkerState]:
    other = Role.DECODE if state.info.role is Role.PREFILL else Role.PREFILL
    return book.fleet.of(state.model, other)


def heard(book: Book, state: WorkerState, role: Role | None) -> None:
    """A heartbeat says what the worker takes: that holds where nothing else was asked of it."""
    if role is not None and role is not state.info.role and state.role_asked is None:
        book.fleet.change_role(state, role)
