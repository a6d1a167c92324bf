"""Workers without room: who is asked next, who waits, and who is refused."""

from __future__ import annotations

import pytest

from coordinator.book import RegistrySettings
from pdserve.core.errors import Overloaded
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import (
    Role,
    StartDecode,
)
from tests.support.model_workers import ModelDecode
from tests.support.registry_steps import pair, sent
from tests.support.registry_world import World, new_request

P, D = WorkerId("prefill-0"), WorkerId("decode-0")


@pytest.fixture
def world() -> World:
    return pair()


def test_a_refusal_sends_the_request_to_another_decode_worker(world: World) -> None:
    world.join("decode-1", Role.DECODE)
    for name in ("decode-0", "decode-1"):
        worker = world.workers[WorkerId(name)]
        assert isinstance(worker, ModelDecode)
        worker.refuse_next = 1 if name == "decode-0" else 0
    for index in range(4):
        world.submit(new_request(f"r{index}"))
    world.run()
    assert {world.outcome(f"r{index}") for index in range(4)} == {"length"}
    assert all(end.report.attempts == 1 for end in world.ends.values())


def test_a_request_that_everyone_refused_waits_until_room_may_have_appeared(world: World) -> None:
    worker = world.workers[D]
    assert isinstance(worker, ModelDecode)
    worker.refuse_next = 1
    world.submit(new_request())
    world.run()
    assert world.registry.num_waiting == 1
    offers = len(sent(world, StartDecode))
    world.tick(1.0)
    assert len(sent(world, StartDecode)) == offers
    world.beat(D)
    world.run()
    assert world.outcome("r") == "length"


def test_after_a_refusal_one_request_at_a_time_finds_out_whether_there_is_room(world: World) -> None:
    worker = world.workers[D]
    assert isinstance(worker, ModelDecode)
    worker.refuse_next = 1
    world.submit(new_request("first"))
    world.flush()
    for index in range(5):
        world.submit(new_request(f"r{index}"))
    world.sent.clear()
    world.beat(D)
    world.deliver_up(D)
    assert len(sent(world, StartDecode)) == 1
    world.run()
    assert set(map(world.outcome, world.requests)) == {"length"}


def test_the_most_urgent_request_goes_first_and_equals_in_order_of_arrival() -> None:
    world = World()
    for name, priority in (("late", 1), ("first", 0), ("second", 0), ("urgent", -1)):
        world.submit(new_request(name, priority=priority))
    world.join("decode-0", Role.DECODE)
    order = [s.message.spec.attempt.request for s in sent(world, StartDecode)]  # type: ignore[union-attr]
    assert order == ["urgent", "first", "second", "late"]


def test_a_prompt_no_worker_will_ever_have_room_for_is_refused_at_once() -> None:
    world = World()
    world.join("decode-0", Role.DECODE, num_blocks=2)
    world.submit(new_request(prompt=[1] * 8))
    assert world.outcome("r") == "BlockPoolExhausted"


def test_a_request_that_waited_for_workers_which_are_too_small_is_refused_when_they_come() -> None:
    world = World()
    world.submit(new_request(prompt=[1] * 8))
    world.join("decode-0", Role.DECODE, num_blocks=2)
    world.run()
    assert world.outcome("r") == "BlockPoolExhausted"


def test_a_request_an_idle_worker_has_no_room_for_is_refused_rather_than_kept_waiting(world: World) -> None:
    worker = world.workers[D]
    assert isinstance(worker, ModelDecode)
    worker.refuse_next = 2
    world.beat(D)
    world.flush()
    world.submit(new_request())
    world.flush()
    assert not world.ends  # what is known of its blocks may be out of date
    world.beat(D)
    world.flush()
    assert world.outcome("r") == "BlockPoolExhausted"


def test_a_crowd_is_not_offered_all_at_once_after_a_refusal() -> None:
    world = World()
    world.join("decode-0", Role.DECODE, max_num_seqs=4)
    for index in range(20):
        world.submit(new_request(f"r{index}", max_tokens=50))
    assert len(sent(world, StartDecode)) == 4
    world.flush()
    assert world.registry.num_waiting == 16
    world.sent.clear()
    for _ in range(10):
        world.beat(D)
        world.flush()
    assert len(sent(world, StartDecode)) == 10
    world.run()
    assert set(map(world.outcome, world.requests)) == {"length"}


def test_a_full_queue_refuses_with_a_hint_when_to_come_back() -> None:
    settings = RegistrySettings(max_queued_requests=2, max_attempts=3, lease_s=3.0, transfer_deadline_s=3.0)
    world = World(settings)
    for name in ("a", "b", "c"):
        world.submit(new_request(name))
    assert set(world.ends) == {"c"}
    error = world.ends[RequestId("c")].outcome
    assert isinstance(error, Overloaded)
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 30


def test_without_a_decode_worker_a_request_waits_a_while_and_then_fails() -> None:
    world = World()
    world.submit(new_request())
    world.tick(29.0)
    assert not world.ends
    world.tick(1.0)
    assert world.outcome("r") == "NoWorkers"
