"""One step at a time through the life of a request, around the registry of `registry_world`."""

from __future__ import annotations

from coordinator.events import FromWorker, Send
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import (
    Role,
    Up,
)
from tests.support.registry_world import World, new_request

D = WorkerId("decode-0")


def pair() -> World:
    """A prefill and a decode worker, which have met."""
    world = World()
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    world.flush()
    world.sent.clear()
    return world


def sent(world: World, kind: type) -> list[Send]:
    return [action for action in world.sent if isinstance(action.message, kind)]


def hear(world: World, worker: WorkerId, message: Up, *, epoch: int = 1) -> None:
    world.handle(FromWorker(worker=worker, epoch=epoch, message=message))


def up_to_prefill(world: World, name: str = "r") -> AttemptId:
    """Submitted, reserved, and sent to the prefill worker, which has not read it yet."""
    world.submit(new_request(name))
    world.deliver_down(D)
    world.deliver_up(D)
    return AttemptId(RequestId(name), 0)
