"""Requests that leave a drained worker with their KV; what becomes of blocks whose coordinator is gone."""

from __future__ import annotations

import pytest

from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Cancel, DropPeer, Migrate, Orphaned, PushesSettled, Role, StartDecode
from tests.support.model_workers import ModelDecode
from tests.support.registry_world import World, new_request

D0, D1, P0, P1 = map(WorkerId, ("decode-0", "decode-1", "prefill-0", "prefill-1"))


def decoding(*names: str, prefill: int = 1, max_tokens: int = 12) -> World:
    """A request that is being written on decode-0; `names` joined after that."""
    world = World()
    for index in range(prefill):
        world.join(f"prefill-{index}", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    world.submit(new_request("r", max_tokens=max_tokens))
    for _ in range(8):
        world.flush()
        for worker in sorted(world.workers):
            world.step(worker)
        while world.pushes:
            world.land(0)
    world.flush()
    assert world.registry.phases() == {Phase.DECODING: 1}
    for name in names:
        world.join(name, Role.DECODE)
        world.flush()
    return world


def at_rest(world: World) -> None:
    world.run()
    world.assert_at_rest()
    assert world.registry.num_unsettled == 0


def test_a_drained_workers_request_moves_with_its_kv_and_is_not_read_again() -> None:
    world = decoding("decode-1")
    world.sent.clear()
    world.drain("decode-0")
    assert world.registry.phases() == {Phase.MIGRATING: 1}
    at_rest(world)
    report = world.ends[RequestId("r")].report
    assert world.outcome("r") == "length"
    assert (report.decode_worker, report.prefill_worker) == (D1, P0)
    assert (report.attempts, report.migrations) == (1, 1)
    assert sum(isinstance(send.message, Migrate) for send in world.sent) == 1
    started = [send.message for send in world.sent if isinstance(send.message, StartDecode)]
    assert [message.prefill_worker for message in started] == [D0]


def test_tokens_written_while_the_move_was_arranged_are_neither_lost_nor_repeated() -> None:
    world = decoding("decode-1")
    world.drain("decode-0")
    for _ in range(3):  # the target's answer waits meanwhile
        world.step(D0)
    at_rest(world)
    assert world.ends[RequestId("r")].report.migrations == 1


def test_a_refused_move_goes_on_in_place_and_is_tried_again() -> None:
    world = decoding("decode-1")
    target = world.workers[D1]
    assert isinstance(target, ModelDecode)
    target.refuse_next = 1
    world.drain("decode-0")
    world.flush()
    assert world.registry.phases() == {Phase.DECODING: 1}
    world.beat(D1)
    world.flush()
    world.tick(0.3)
    assert world.registry.phases() == {Phase.MIGRATING: 1}
    at_rest(world)
    assert world.ends[RequestId("r")].report.migrations == 1


def test_without_another_worker_the_request_finishes_where_it_is_past_the_deadline() -> None:
    world = decoding()
    world.drain("decode-0", timeout_s=1.0)
    world.tick(2.0)
    at_rest(world)
    report = world.ends[RequestId("r")].report
    assert (report.attempts, report.migrations, report.decode_worker) == (1, 0, D0)


def test_what_cannot_move_starts_over_at_the_deadline_and_costs_no_attempt() -> None:
    world = decoding("decode-1")
    target = world.workers[D1]
    assert isinstance(target, ModelDecode)
    target.refuse_next = 1
    world.drain("decode-0", timeout_s=1.0)
    world.flush()
    world.tick(1.5)
    world.beat(D1)
    at_rest(world)
    report = world.ends[RequestId("r")].report
    assert (report.attempts, report.migrations, report.decode_worker) == (1, 0, D1)


@pytest.mark.parametrize("gone", ["decode-0", "decode-1"])
@pytest.mark.parametrize("deliveries", range(6))
def test_either_side_may_die_at_any_moment_of_a_move(gone: str, deliveries: int) -> None:
    world = decoding("decode-1", max_tokens=20)
    world.drain("decode-0")
    for _ in range(deliveries):
        for worker in (D1, D0):
            if world.down[worker]:
                world.deliver_down(worker)
            world.step(worker)
            if world.up[worker]:
                world.deliver_up(worker)
        if world.pushes and deliveries % 2:
            world.land(0)
    world.end_process(gone)
    if gone == "decode-1":
        assert world.registry.phases().get(Phase.MIGRATING) is None
        world.join("decode-2", Role.DECODE)
    else:
        world.beat(D1)
    at_rest(world)
    assert world.outcome("r") == "length"


def test_a_cancel_in_the_middle_of_a_move_returns_every_block() -> None:
    world = decoding("decode-1")
    world.drain("decode-0")
    world.flush()
    world.step(D0)
    assert world.pushes
    world.cancel("r")
    at_rest(world)
    assert world.outcome("r") == "RequestCancelled"


def test_orphans_are_asked_about_and_their_blocks_come_back() -> None:
    world = decoding()
    orphan = Orphaned(attempt=AttemptId(RequestId("other"), 3), writer=P0, writer_epoch=1)
    world.up[D0].append(orphan)
    world.sent.clear()
    world.flush()
    sent = [(send.worker, type(send.message)) for send in world.sent]
    assert sent == [(P0, Cancel), (D0, PushesSettled)]


def test_orphans_of_a_writer_that_was_replaced_are_dropped() -> None:
    world = decoding()
    world.join("prefill-0", Role.PREFILL, epoch=2)
    orphan = Orphaned(attempt=AttemptId(RequestId("other"), 3), writer=P0, writer_epoch=1)
    world.up[D0].append(orphan)
    world.sent.clear()
    world.deliver_up(D0)
    assert [send.message for send in world.sent] == [DropPeer(peer=P0, epoch=1)]


def test_orphans_of_a_writer_that_is_away_wait_until_it_joins() -> None:
    world = decoding()
    orphan = Orphaned(attempt=AttemptId(RequestId("other"), 3), writer=P1, writer_epoch=1)
    world.up[D0].append(orphan)
    world.flush()
    world.sent.clear()
    world.join("prefill-1", Role.PREFILL, epoch=1)
    assert (P1, orphan.attempt) in [
        (send.worker, send.message.attempt) for send in world.sent if isinstance(send.message, Cancel)
    ]


def test_a_retry_goes_to_the_prefill_worker_that_has_the_prefix() -> None:
    for _ in range(4):
        world = decoding("decode-1", prefill=3)
        reader = next(s.worker for s in world.sent if type(s.message).__name__ == "StartPrefill")
        world.sent.clear()
        world.end_process("decode-0")
        at_rest(world)
        again = [s.worker for s in world.sent if type(s.message).__name__ == "StartPrefill"]
        assert again == [reader]
        assert world.ends[RequestId("r")].report.attempts == 2


def test_a_connection_made_again_does_not_end_the_process() -> None:
    world = decoding(max_tokens=20)
    world.reconnect("decode-0")
    at_rest(world)
    assert world.outcome("r") == "length"
    assert world.ends[RequestId("r")].report.attempts == 2
    assert not any(isinstance(send.message, DropPeer) for send in world.sent)
