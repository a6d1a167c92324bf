"""A worker that changed its role and died: the one that is started for it takes up the same role."""

from __future__ import annotations

from coordinator.events import Action, ChangeWorkerRole, FromWorker, Send, WorkerGone, WorkerJoined
from coordinator.registry import Registry
from coordinator.service import make_registry
from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.core.messages import ChangeRole, Role, RoleChanged
from tests.support.model_workers import worker_info

WORKER = WorkerId("decode-1")


def asked(actions: list[Action]) -> list[Role]:
    """Of `WORKER`, in order."""
    sent = [action for action in actions if isinstance(action, Send) and action.worker == WORKER]
    return [send.message.role for send in sent if isinstance(send.message, ChangeRole)]


def joined(registry: Registry, epoch: int) -> list[Role]:
    info = worker_info(WORKER, Role.DECODE, epoch=epoch)
    return asked(registry.handle(WorkerJoined(info=info, model="m"), float(epoch)))


def test_a_successor_takes_up_the_role_that_was_asked_for_last() -> None:
    registry = make_registry(ServeConfig())
    assert joined(registry, 1) == []
    assert asked(registry.handle(ChangeWorkerRole(worker=WORKER, role=Role.PREFILL), 1.0)) == [Role.PREFILL]
    registry.handle(WorkerGone(worker=WORKER, epoch=1, why="killed"), 1.5)
    assert joined(registry, 2) == [Role.PREFILL]
    changed = RoleChanged(worker=WORKER, epoch=2, role=Role.PREFILL)
    registry.handle(FromWorker(worker=WORKER, epoch=2, message=changed), 2.5)
    state = registry.fleet.get(WORKER)
    assert state is not None
    assert state.info.role is Role.PREFILL
    assert state.takes_prompts()
    assert asked(registry.handle(ChangeWorkerRole(worker=WORKER, role=Role.DECODE), 2.6)) == [Role.DECODE]
    registry.handle(WorkerGone(worker=WORKER, epoch=2, why="killed"), 2.7)
    assert joined(registry, 3) == []
