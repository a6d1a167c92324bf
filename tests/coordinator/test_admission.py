"""Who is refused, who waits, and who gives way to whom."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.book import RegistrySettings
from pdserve.core.config import Admission, RoutingPolicy
from pdserve.core.errors import Overloaded
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Cancel, Preempt, Role, StartDecode
from pdserve.core.sla_settings import TenantSettings
from tests.support.model_workers import continuation
from tests.support.registry_world import SETTINGS, World, new_request

D = WorkerId("decode-0")


def world_of(
    settings: RegistrySettings = SETTINGS,
    *,
    policy: RoutingPolicy = RoutingPolicy.LEAST_LOADED,
    num_blocks: int = 64,
    max_num_seqs: int = 16,
) -> World:
    world = World(settings, policy)
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE, num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    world.flush()
    world.sent.clear()
    return world


def sent(world: World, kind: type) -> list[str]:
    return [str(s.message.attempt) for s in world.sent if isinstance(s.message, kind)]  # type: ignore[union-attr]


def started(world: World) -> list[str]:
    return [s.message.spec.attempt.request for s in world.sent if isinstance(s.message, StartDecode)]


def refused(world: World, name: str) -> Overloaded:
    outcome = world.ends[RequestId(name)].outcome
    assert isinstance(outcome, Overloaded), outcome
    return outcome


def writing(world: World, name: str, *, priority: int = 10, tokens: int = 50, **more: object) -> None:
    """A request that writes its answer, and has told some of it."""
    request = new_request(name, max_tokens=tokens, priority=priority, preemptible=True, **more)  # type: ignore[arg-type]
    world.submit(request)
    for _ in range(20):
        if len(world.output[request.id]) >= 3:
            return
        while world.pushes:
            world.land(0)
        for worker in list(world.workers):
            world.step(worker)
        world.flush()
    raise AssertionError(f"{name} writes nothing")


def teach_decode(world: World, *, base_s: float, per_seq_s: float) -> None:
    state = world.registry.fleet.get(D)
    assert state is not None
    beat = world.workers[D].heartbeat()
    for index in range(1, 40):
        seqs = 1 + index % 5
        step_s = base_s + per_seq_s * seqs
        state.latency.heard(
            replace(
                beat, steps=index, running=seqs, waiting_tokens=10 * seqs, step_s=step_s, tokens_per_s=1.0
            )
        )


# --- tenants ------------------------------------------------------------------------------------------


def test_a_tenant_over_its_rate_is_refused_with_a_hint_and_others_are_not() -> None:
    world = world_of(replace(SETTINGS, tenants={"a": TenantSettings(max_requests_per_s=1, burst_s=2)}))
    for index in range(3):
        world.submit(new_request(f"a{index}", tenant="a"))
    world.submit(new_request("b0", tenant="b"))
    error = refused(world, "a2")
    assert error.retry_after_s == pytest.approx(1.0)
    world.run()
    assert [world.outcome(name) for name in ("a0", "a1", "b0")] == ["length"] * 3
    world.assert_at_rest()


def test_samples_of_one_request_are_taken_or_refused_together() -> None:
    world = world_of(replace(SETTINGS, tenants={"*": TenantSettings(max_concurrent=3)}))
    world.submit(*(new_request(f"x.{i}", tenant="t") for i in range(2)))
    world.submit(*(new_request(f"y.{i}", tenant="t") for i in range(2)))
    assert {world.outcome(f"y.{i}") for i in range(2)} == {"Overloaded"}
    world.run()
    world.submit(*(new_request(f"z.{i}", tenant="t") for i in range(3)))
    world.run()
    assert {world.outcome(f"z.{i}") for i in range(3)} == {"length"}


def test_waiting_tenants_take_turns_and_one_that_floods_waits_for_itself() -> None:
    world = world_of(max_num_seqs=1)
    writing(world, "first")
    for index in range(6):
        world.submit(new_request(f"flood{index}", tenant="flood", priority=10))
    world.submit(new_request("polite", tenant="polite", priority=10))
    world.run()
    order = [name for name in dict.fromkeys(started(world)) if name != "first"]
    assert order.index("polite") <= 3


# --- the queue ----------------------------------------------------------------------------------------


def test_a_full_queue_refuses_the_least_urgent_also_when_it_was_there_first() -> None:
    world = world_of(replace(SETTINGS, max_queued_requests=2), max_num_seqs=1)
    writing(world, "busy", priority=0)
    for name in ("batch0", "batch1"):
        world.submit(new_request(name, priority=10))
    world.flush()
    world.submit(new_request("batch2", priority=10))
    assert refused(world, "batch2").retry_after_s is not None
    world.submit(new_request("urgent", priority=0))
    assert "a more urgent request came" in str(refused(world, "batch1"))
    world.run()
    assert (world.outcome("urgent"), world.outcome("batch0")) == ("length", "length")
    world.assert_at_rest()


def test_who_has_waited_too_long_is_refused_and_who_has_begun_is_not() -> None:
    world = world_of(replace(SETTINGS, queue_ttl_s=5.0), max_num_seqs=1)
    writing(world, "runs", priority=0)
    world.submit(new_request("waits"))
    world.submit(new_request("patient", queue_ttl_s=60.0))
    world.flush()
    world.tick(5.1)
    assert "has waited 5.1 s" in str(refused(world, "waits"))
    assert RequestId("runs") not in world.ends
    world.run()
    assert (world.outcome("runs"), world.outcome("patient")) == ("length", "length")
    world.assert_at_rest()


# --- preemption ---------------------------------------------------------------------------------------


def test_batch_work_gives_way_to_a_request_that_would_be_late_and_goes_on_with_the_same_tokens() -> None:
    world = world_of(max_num_seqs=1)
    writing(world, "batch")
    told = len(world.output[RequestId("batch")])
    world.submit(new_request("urgent", ttft_target_s=0.5))
    world.flush()
    assert sent(world, Preempt) == ["batch#0"]
    assert sent(world, Cancel) == []
    assert world.registry.num_waiting == 1
    world.run()
    assert world.outcome("urgent") == "length"
    assert world.outcome("batch") == "length"
    assert told < 50
    assert world.output[RequestId("batch")] == continuation([1, 2, 3], 50)
    report = world.ends[RequestId("batch")].report
    assert (report.preemptions, report.attempts) == (1, 1)
    assert started(world)[-1] == "batch"
    world.assert_at_rest()


@pytest.mark.parametrize(
    "kept",
    [
        {"priority": 0},  # as urgent
        {"preemptible": False},
    ],
)
def test_who_is_as_urgent_or_not_preemptible_is_left_alone(kept: dict[str, object]) -> None:
    world = world_of(max_num_seqs=1)
    request = new_request("batch", max_tokens=20, **{"priority": 10, "preemptible": True, **kept})  # type: ignore[arg-type]
    world.submit(request)
    for _ in range(8):
        while world.pushes:
            world.land(0)
        for worker in list(world.workers):
            world.step(worker)
        world.flush()
    world.submit(new_request("urgent", ttft_target_s=0.5))
    world.run()
    assert sent(world, Preempt) == []
    assert (world.outcome("batch"), world.outcome("urgent")) == ("length", "length")


def test_who_can_wait_waits_and_who_has_no_target_always_can() -> None:
    world = world_of(max_num_seqs=1)
    writing(world, "batch")
    world.submit(new_request("calm", ttft_target_s=1e6))
    world.submit(new_request("whenever"))
    world.flush()
    assert sent(world, Preempt) == []
    world.run()
    world.assert_at_rest()


def test_nobody_is_interrupted_more_often_than_allowed() -> None:
    world = world_of(replace(SETTINGS, max_preemptions=1), max_num_seqs=1)
    writing(world, "batch")
    for name in ("one", "two"):
        world.submit(new_request(name, ttft_target_s=0.5))
        world.flush()
        while RequestId(name) not in world.ends:
            for worker in list(world.workers):
                world.step(worker)
            while world.pushes:
                world.land(0)
            world.flush()
            world.now += 1.0
    assert sent(world, Preempt) == ["batch#0"]
    world.run()
    world.assert_at_rest()


def test_as_many_give_way_as_the_prompt_needs_blocks_and_the_least_urgent_first() -> None:
    world = world_of(num_blocks=6)
    for name, priority in (("mild", 5), ("lazy", 20), ("idle", 20)):
        writing(world, name, priority=priority, prompt=list(range(1, 8)))
    size = world.workers[D].info.block_tokens
    world.submit(new_request("urgent", prompt=[1] * (size * 3), ttft_target_s=0.5))
    world.flush()
    asked = [str(s.message.attempt.request) for s in world.sent if isinstance(s.message, Preempt)]
    assert asked
    assert "mild" not in asked or len(asked) == 3
    world.run()
    assert {world.outcome(n) for n in ("mild", "lazy", "idle", "urgent")} == {"length"}
    world.assert_at_rest()


def test_a_client_that_leaves_while_its_request_gives_way_leaves_nothing_behind() -> None:
    world = world_of(max_num_seqs=1)
    writing(world, "batch")
    world.submit(new_request("urgent", ttft_target_s=0.5))
    while not sent(world, Preempt):
        world.deliver_down(D)
        world.deliver_up(D)
    world.cancel("batch")
    world.run()
    assert (world.outcome("batch"), world.outcome("urgent")) == ("RequestCancelled", "length")
    world.assert_at_rest()


# --- tokens per second --------------------------------------------------------------------------------

TARGETS = replace(SETTINGS, admission=Admission.TARGETS)


def test_a_speed_that_no_worker_reaches_is_refused_at_once_with_the_best_there_is() -> None:
    world = world_of(TARGETS, policy=RoutingPolicy.SLA)
    teach_decode(world, base_s=0.02, per_seq_s=0.01)
    world.submit(new_request("dream", tpot_target_s=0.01))
    assert "the fastest worker takes" in str(refused(world, "dream"))
    world.submit(new_request("sober", tpot_target_s=0.05))
    world.run()
    assert world.outcome("sober") == "length"


def test_who_would_slow_others_below_their_target_waits_until_one_has_ended() -> None:
    world = world_of(TARGETS, policy=RoutingPolicy.SLA)
    teach_decode(world, base_s=0.01, per_seq_s=0.01)
    for name in ("a", "b"):
        writing(world, name, priority=0, tpot_target_s=0.035, tokens=30)
    world.submit(new_request("third", priority=0))
    world.flush()
    assert "third" not in started(world)
    world.run()
    assert world.outcome("third") == "length"
    assert {world.outcome("a"), world.outcome("b")} == {"length"}
    world.assert_at_rest()


def test_without_admission_by_targets_the_third_joins_at_once() -> None:
    world = world_of(replace(SETTINGS, admission=Admission.TTFT), policy=RoutingPolicy.SLA)
    teach_decode(world, base_s=0.01, per_seq_s=0.01)
    for name in ("a", "b"):
        writing(world, name, priority=0, tpot_target_s=0.035, tokens=30)
    world.submit(new_request("third", priority=0))
    world.flush()
    assert "third" in started(world)
    world.run()


# --- promises -----------------------------------------------------------------------------------------


def test_a_promise_that_cannot_be_kept_any_more_is_taken_back_before_any_work_is_done() -> None:
    world = world_of(replace(SETTINGS, admission=Admission.TTFT), policy=RoutingPolicy.SLA, max_num_seqs=1)
    reader = world.registry.fleet.get(WorkerId("prefill-0"))
    assert reader is not None
    at = 0.0
    for index in range(12):
        attempt = AttemptId(RequestId(f"t{index}"), 0)
        reader.latency.prompt_sent(attempt, 100 + index, at)
        at += (100 + index) / 1000
        reader.latency.prompt_read(attempt, at)
        at += 1.0
    writing(world, "runs", priority=0)
    world.submit(new_request("late", ttft_target_s=20.0, arrived=world.now))
    world.submit(new_request("whenever"))
    world.flush()
    world.now += 30.0
    world.run()
    assert "after its TTFT target" in str(refused(world, "late"))
    assert "late" not in started(world)[2:]
    assert world.outcome("whenever") == "length"
    world.assert_at_rest()
