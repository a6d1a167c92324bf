"""Every attempt of a request leaves a leg: what it used, and how its time went."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.account import Leg, Pace
from coordinator.events import FromWorker
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Heartbeat, Role
from pdserve.core.worker_state import BlockCounts
from tests.support.model_workers import ModelDecode
from tests.support.registry_world import World, new_request

PROMPT = [5] * 12


def beat(worker: str, tokens: int, busy_s: float) -> Heartbeat:
    return Heartbeat(
        worker=WorkerId(worker),
        epoch=1,
        blocks=BlockCounts(total=64, free=64, held=0, cached=0, quarantined=0),
        waiting=0,
        running=0,
        waiting_tokens=0,
        step_s=0.01,
        tokens_per_s=100.0,
        prefix_hit_tokens=0,
        prefix_query_tokens=0,
        steps=1,
        tokens_computed=tokens,
        busy_s=busy_s,
    )


@pytest.fixture
def world() -> World:
    """A prefill worker that takes 10 ms per token, two decode workers that take 50 ms."""
    world = World()
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    for worker, tokens, busy_s in (("prefill-0", 100, 1.0), ("decode-0", 100, 5.0)):
        hear(world, worker, tokens, busy_s)
    return world


def hear(world: World, worker: str, tokens: int, busy_s: float) -> None:
    world.handle(FromWorker(worker=WorkerId(worker), epoch=1, message=beat(worker, tokens, busy_s)))


def legs(world: World, name: str = "r") -> tuple[Leg, ...]:
    return world.ends[RequestId(name)].report.legs


def test_a_request_is_charged_its_tokens_at_the_pace_of_each_worker(world: World) -> None:
    world.submit(new_request(prompt=PROMPT, max_tokens=5))
    world.run()
    (leg,) = legs(world)
    assert leg.prefill_device_s == pytest.approx(12 * 0.01)
    assert leg.decode_device_s == pytest.approx(4 * 0.05)  # the first token came of reading the prompt
    assert (leg.prefill_on, leg.decode_on) == (Role.PREFILL, Role.DECODE)
    assert leg.transfer is not None
    assert leg.transfer.bytes_moved == 4096
    assert not leg.failure
    assert world.ends[RequestId("r")].report.phase is Phase.FINISHED


def test_kv_held_is_counted_by_size_and_time(world: World) -> None:
    world.submit(new_request(prompt=PROMPT, max_tokens=5))
    world.flush()
    world.now += 2.0
    world.run()
    token_bytes = world.registry.fleet.get(WorkerId("decode-0")).kv_token_bytes  # type: ignore[union-attr]
    (leg,) = legs(world)
    assert leg.kv_byte_s == pytest.approx(token_bytes * (12 + 5 / 2) * 2.0)


def test_a_retry_is_a_leg_of_its_own_and_the_first_says_why_it_failed(world: World) -> None:
    world.join("decode-1", Role.DECODE)
    world.submit(new_request(prompt=PROMPT, max_tokens=5))
    world.flush()
    for _ in range(3):
        world.step(WorkerId("prefill-0"))
        world.flush()
    models = {name: world.workers[WorkerId(name)] for name in ("decode-0", "decode-1")}
    holder = next(n for n, m in models.items() if isinstance(m, ModelDecode) and m.reservations)
    world.end_process(holder)
    world.run()
    first, second = legs(world)
    assert (first.failure, first.repeated) == ("worker_lost", False)
    assert (second.failure, second.repeated) == ("", True)
    assert second.attempt.epoch > first.attempt.epoch


def test_a_request_that_moves_has_a_leg_on_each_decode_worker(world: World) -> None:
    world.submit(new_request(prompt=PROMPT, max_tokens=9))
    world.flush()
    while not world.output[RequestId("r")]:
        for worker in list(world.workers):
            world.step(worker)
        while world.pushes:
            world.land(0)
        world.flush()
    world.join("decode-1", Role.DECODE)
    hear(world, "decode-1", 100, 10.0)
    world.drain("decode-0")
    world.run()
    before, after = legs(world)
    assert (before.decode_worker, after.decode_worker) == ("decode-0", "decode-1")
    assert before.output_tokens + after.output_tokens == 9
    assert after.prefill_device_s == 0.0
    assert after.decode_device_s == pytest.approx(0.1 * after.output_tokens)
    assert not after.repeated
    assert after.transfer is None


def test_a_refused_or_waiting_request_has_no_leg() -> None:
    world = World()
    world.submit(new_request())
    world.cancel("r")
    assert legs(world) == ()


def test_a_pace_is_that_of_the_time_between_heartbeats() -> None:
    pace = Pace()
    pace.heard(beat("d", 100, 1.0))
    assert pace.s_per_token == pytest.approx(0.01)
    pace.heard(beat("d", 100, 1.0))  # idle: nothing is learnt
    assert pace.s_per_token == pytest.approx(0.01)
    for total in range(2, 40):
        pace.heard(beat("d", 100 * total, 1.0 + 2.0 * (total - 1)))
    assert pace.s_per_token == pytest.approx(0.02, rel=0.01)


def test_devices_multiply_what_a_request_is_charged(world: World) -> None:
    state = world.registry.fleet.get(WorkerId("decode-0"))
    assert state is not None
    state.info = dataclasses.replace(state.info, num_devices=8.0)
    world.submit(new_request(prompt=PROMPT, max_tokens=5))
    world.run()
    (leg,) = legs(world)
    assert leg.decode_device_s == pytest.approx(4 * 0.05 * 8)
