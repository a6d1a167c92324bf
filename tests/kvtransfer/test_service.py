"""The service over transports that misbehave: deadlines, exactly one end, wake-ups, and its own end."""

from __future__ import annotations

import os
import time

import pytest

from kvtransfer.factory import make_backend
from kvtransfer.fake import Faults
from kvtransfer.local import LocalBackend, LocalHub
from kvtransfer.protocol import Outcome, PushEnded, TransferEvent
from kvtransfer.service import TransferService
from kvtransfer.waiting import Waiter
from pdserve.core.errors import ConfigError, TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.transfer_settings import TransferBackendName
from tests.support.transfer import FULL, LAYOUTS, Events, Node, NodeMaker, Pools, fingerprint


def faulty_pair(make_node: NodeMaker, faults: Faults, **options: int) -> tuple[Node, Node]:
    sender = make_node("p", backend="fake", seed=1, faults=faults, **options)
    receiver = make_node("d", backend="fake")
    sender.meet(receiver)
    return sender, receiver


def outcomes(node: Node, push_id: int) -> list[Outcome]:
    return [e.outcome for e in node.events.of_push(push_id)]


def test_a_push_under_way_at_its_deadline_is_timed_out_and_then_completed(make_node: NodeMaker) -> None:
    sender, receiver = faulty_pair(make_node, Faults(delay_s=(0.5, 0.5)))
    push_id = sender.push("d", [0], [0], deadline_s=0.1)
    assert sender.events.terminal(push_id).outcome is Outcome.COMPLETED
    assert outcomes(sender, push_id) == [Outcome.TIMED_OUT, Outcome.COMPLETED]
    assert receiver.events.await_notes(1) == [b"note"]


def test_a_push_that_waits_past_its_deadline_is_cancelled_and_never_sent(make_node: NodeMaker) -> None:
    sender, receiver = faulty_pair(make_node, Faults(delay_s=(0.5, 0.5)), max_inflight_bytes=1)
    first = sender.push("d", [0], [0], note=b"first")
    second = sender.push("d", [1], [1], note=b"second", deadline_s=0.1)
    third = sender.push("d", [2], [2], note=b"third")
    assert sender.events.terminal(second).outcome is Outcome.CANCELLED
    assert outcomes(sender, second) == [Outcome.TIMED_OUT, Outcome.CANCELLED]
    assert sender.events.terminal(first).outcome is Outcome.COMPLETED
    assert sender.events.terminal(third).outcome is Outcome.COMPLETED
    assert receiver.events.await_notes(2) == [b"first", b"third"]


def test_a_lost_push_is_timed_out_once_and_fails_when_its_peer_is_dropped(make_node: NodeMaker) -> None:
    sender, receiver = faulty_pair(make_node, Faults(loss=1.0))
    push_id = sender.push("d", [0], [0], deadline_s=0.05)
    sender.events.until(lambda: bool(sender.events.of_push(push_id)), "deadline")
    sender.service.disconnect(receiver.name)
    assert sender.events.terminal(push_id).outcome is Outcome.FAILED
    assert outcomes(sender, push_id) == [Outcome.TIMED_OUT, Outcome.FAILED]


@pytest.mark.parametrize("seed", range(5))
def test_every_push_ends_exactly_once_whatever_goes_wrong(make_node: NodeMaker, seed: int) -> None:
    faults = Faults(
        seed=seed, delay_s=(0, 0.05), reorder=True, loss=0.1, failure=0.1, duplicate=0.1, flip=0.1
    )
    sender, receiver = faulty_pair(make_node, faults, max_inflight_bytes=4 * FULL.block_bytes)
    ids = [sender.push("d", [i % 24], [i % 24], deadline_s=0.2) for i in range(100)]
    for push_id in ids:
        sender.events.until(lambda p=push_id: bool(sender.events.of_push(p)), "news of a push")  # type: ignore[misc]
    sender.service.disconnect(receiver.name)
    sender.stop()
    for push_id in ids:
        seen = sender.events.of_push(push_id)
        assert [e.terminal for e in seen].count(True) == 1
        assert seen[-1].terminal
        assert len(seen) <= 2
    assert len({e.outcome for i in ids for e in sender.events.of_push(i)}) >= 3, "nothing went wrong"


class Scripted(LocalBackend):
    """A local backend whose polls a test replaces."""

    broken: Exception | None = None
    extra: list[TransferEvent]

    def poll(self, now: float) -> list[TransferEvent]:
        if self.broken is not None:
            raise self.broken
        events, self.extra = [*super().poll(now), *self.extra], []
        return events


def scripted() -> tuple[Scripted, TransferService, Events]:
    pools = Pools(LAYOUTS, 2, seed=1)
    backend = Scripted(LocalHub(), WorkerId("p"), 1, pools.regions, fingerprint())
    backend.extra = []
    events = Events()
    return backend, TransferService(backend, events), events


def test_a_transport_that_breaks_ends_the_service_loudly() -> None:
    backend, service, events = scripted()
    backend.broken = RuntimeError("out of luck")
    service.start()
    assert "out of luck" in events.await_stopped().error
    assert service.join(30)
    with pytest.raises(TransferError):
        service.disconnect(WorkerId("d"))
    service.stop()


def test_a_second_end_of_a_push_is_not_passed_on() -> None:
    backend, service, events = scripted()
    backend.extra = [PushEnded(id=99, outcome=Outcome.COMPLETED)]
    service.start()
    service.disconnect(WorkerId("nobody"))  # wakes it
    service.stop()
    events.await_stopped()
    assert events.of_push(99) == []


def test_commands_given_before_the_start_are_performed() -> None:
    _, service, events = scripted()
    service.connect(WorkerId("d"), 1, fingerprint(), b"")
    service.start()
    events.until(lambda: events.failed_peers == ["d"], "refusal")
    service.stop()
    service.stop()
    assert service.join(30)


def test_a_descriptor_that_wakes_for_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.waiting.SPURIOUS_WAKES", 5)
    own, stuck = os.eventfd(0), os.eventfd(1)
    waiter = Waiter(own, (stuck,))
    try:
        waiter.saw_event(0.0)
        for _ in range(6):
            waiter.wait(30.0, now=100.0)
        began = time.monotonic()
        waiter.wait(30.0, now=100.0)
        assert 0.0005 < time.monotonic() - began < 10, "it polls each millisecond from now on"
        os.eventfd_write(own, 1)
        waiter.wait(30.0, now=100.0)
    finally:
        waiter.close()
        os.close(own)
        os.close(stuck)


def test_backends_of_one_process_need_a_hub() -> None:
    pools = Pools(LAYOUTS, 2, seed=1)
    for name in (TransferBackendName.LOCAL, TransferBackendName.FAKE):
        with pytest.raises(ConfigError, match="LocalHub"):
            make_backend(name, WorkerId("p"), 1, pools.regions, fingerprint())
