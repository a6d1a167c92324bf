"""Requests go where their targets are met, and are refused at once where nobody can meet them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.fleet import Fleet, WorkerState
from coordinator.latency import Work
from coordinator.pool import SAMPLE
from coordinator.router import Router
from coordinator.sla import Goal
from pdserve.core.config import Admission, LocalPrefill, RoutingPolicy
from pdserve.core.errors import Overloaded
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Role
from tests.support.model_workers import ModelDecode, worker_info
from tests.support.registry_world import SETTINGS, World, new_request

MODEL = "m"


def attempt(name: str) -> AttemptId:
    return AttemptId(RequestId(name), 0)


def teach_prefill(state: WorkerState, tokens_per_s: float, count: int = 20) -> None:
    """Lone prompts of several lengths, read at this speed."""
    now = 0.0
    for index in range(count + 1):
        tokens = 100 * (1 + index % 7)
        state.latency.prompt_sent(attempt(f"t{index}"), tokens, now)
        now += tokens / tokens_per_s
        state.latency.prompt_read(attempt(f"t{index}"), now)
        now += 1.0


def teach_decode(state: WorkerState, step_s: float) -> None:
    decode = ModelDecode(state.info)
    for index in range(1, 20):
        beat = replace(
            decode.heartbeat(), steps=index, running=index, waiting_tokens=100 * index, step_s=step_s
        )
        state.latency.heard(beat)


def fleet_of(prefill: int, decode: int) -> Fleet:
    fleet = Fleet()
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for index in range(count):
            fleet.add(WorkerState(info=worker_info(f"{role.value}-{index:04}", role), model=MODEL))
    return fleet


def placed(fleet: Fleet, tokens: int, goal: Goal) -> tuple[str, str]:
    router = Router(RoutingPolicy.SLA, seed=0, local_prefill=LocalPrefill.NEVER)
    placement = router.place(fleet, MODEL, tokens, goal=goal)
    assert placement is not None
    assert placement.prefill is not None
    assert placement.prefill.reason == placement.decode.reason == "least predicted violation, then load"
    return placement.prefill.worker, placement.decode.worker


def test_a_tpot_target_outweighs_an_emptier_batch() -> None:
    fleet = fleet_of(1, 2)
    slow, fast = fleet.of(MODEL, Role.DECODE)
    teach_decode(slow, 0.1)
    teach_decode(fast, 0.02)
    fast.place_decode(attempt("other"), 8)
    assert placed(fleet, 8, Goal(tpot_s=0.05))[1] == fast.id
    assert placed(fleet, 8, Goal())[1] == slow.id


def test_a_ttft_target_sends_a_prompt_past_the_shorter_queue_of_a_slower_worker() -> None:
    fleet = fleet_of(2, 1)
    slow, fast = fleet.of(MODEL, Role.PREFILL)
    teach_prefill(slow, 500.0)
    teach_prefill(fast, 5000.0)
    fast.place_prefill(attempt("other"), 900)
    assert placed(fleet, 400, Goal(ttft_s=0.5, due=10.0))[0] == fast.id


def test_without_prefill_workers_how_soon_a_prompt_is_read_counts_too() -> None:
    fleet = fleet_of(0, 2)
    first, second = fleet.of(MODEL, Role.DECODE)
    for state in (first, second):
        teach_prefill(state, 1000.0)
    first.place_prefill(attempt("reading"), 5000, due=1.0)
    second.place_decode(attempt("writing"), 8)
    placement = Router(RoutingPolicy.SLA, seed=0).place(fleet, MODEL, 100, goal=Goal(ttft_s=1.0, due=10.0))
    assert placement is not None
    assert placement.decode.worker == second.id


def test_only_prompts_that_are_due_no_later_are_ahead() -> None:
    (state,) = fleet_of(1, 0).of(MODEL, Role.PREFILL)
    state.place_prefill(attempt("batch"), 1000, due=100.0)
    state.place_prefill(attempt("urgent"), 10, due=1.0)
    assert state.work_due(2.0) == Work.of(0, 10, ends=True)
    assert state.work_due(100.0) == state.work_left
    state.release(attempt("batch"))
    state.release(attempt("urgent"))
    assert state.work_due(-1.0) == Work()


def test_of_many_workers_a_sample_is_looked_at_and_a_lonely_one_with_room_is_found() -> None:
    fleet = fleet_of(0, 500)
    for state in fleet.of(MODEL, Role.DECODE)[:-1]:
        state.refused()
    router = Router(RoutingPolicy.SLA, seed=0)
    placement = router.place(fleet, MODEL, 8)
    assert placement is not None
    assert placement.decode.worker == "decode-0499"
    for state in fleet:
        state.room_may_have_appeared()
    placement = router.place(fleet, MODEL, 8)
    assert placement is not None
    assert 1 < len(placement.decode.candidates) <= SAMPLE


def test_load_spreads_over_many_workers_although_each_sees_a_sample() -> None:
    fleet = fleet_of(0, 100)
    router = Router(RoutingPolicy.SLA, seed=0)
    for index in range(400):
        placement = router.place(fleet, MODEL, 8)
        assert placement is not None
        state = fleet.get(placement.decode.worker)
        assert state is not None
        state.place_decode(attempt(f"r{index}"), 8)
        state.reserved(attempt(f"r{index}"))
    assert max(len(state.blocks_placed) for state in fleet) <= 6


def test_the_fleet_is_listed_by_name_whoever_comes_and_goes() -> None:
    fleet, names = Fleet(), list("dacbe")
    for name in names:
        fleet.add(WorkerState(info=worker_info(name, Role.DECODE), model=MODEL))
    fleet.add(WorkerState(info=worker_info("c", Role.DECODE, epoch=2), model=MODEL))
    fleet.forget(WorkerId("a"))
    fleet.forget(WorkerId("never"))
    assert [s.id for s in fleet.of(MODEL, Role.DECODE)] == ["b", "c", "d", "e"]


# --- admission --------------------------------------------------------------------------------------------


def world_with(admission: Admission, policy: RoutingPolicy = RoutingPolicy.SLA) -> World:
    world = World(replace(SETTINGS, admission=admission), policy)
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    return world


def busy(world: World, *, evidence: int = 20) -> None:
    """A prefill worker of 100 tokens/s with ten seconds of prompts that are due before any other."""
    prefill = world.registry.fleet.get(WorkerId("prefill-0"))
    assert prefill is not None
    teach_prefill(prefill, 100.0, evidence)
    prefill.place_prefill(attempt("ahead"), 1000, due=-1.0)


def submit(world: World, *, ttft_target_s: float | None, patience_s: float) -> None:
    request = new_request("r", arrived=world.now, deadline=world.now + patience_s)
    world.submit(replace(request, ttft_target_s=ttft_target_s))


@pytest.mark.parametrize(
    ("admission", "ttft_target_s", "patience_s", "refused"),
    [
        (Admission.TTFT, 1.0, 600.0, True),
        (Admission.TTFT, 60.0, 600.0, False),
        (Admission.DEADLINE, 1.0, 600.0, False),
        (Admission.DEADLINE, None, 1.0, True),
        (Admission.DEADLINE, None, 60.0, False),
        (Admission.OFF, 1.0, 1.0, False),
    ],
)
def test_what_nobody_can_serve_in_time_is_refused_at_once_if_so_configured(
    admission: Admission, ttft_target_s: float | None, patience_s: float, refused: bool
) -> None:
    world = world_with(admission)
    busy(world)
    submit(world, ttft_target_s=ttft_target_s, patience_s=patience_s)
    end = world.ends.get(RequestId("r"))
    assert (end is not None) == refused
    if end is not None:
        assert isinstance(end.outcome, Overloaded)
        assert end.outcome.retry_after_s is not None
        assert 5.0 < end.outcome.retry_after_s <= 10.0


def test_nothing_is_refused_while_little_is_known_of_a_worker() -> None:
    world = world_with(Admission.TTFT)
    busy(world, evidence=3)
    submit(world, ttft_target_s=1.0, patience_s=600.0)
    assert not world.ends


def test_other_policies_refuse_nothing_early() -> None:
    world = world_with(Admission.TTFT, RoutingPolicy.POWER_OF_TWO)
    busy(world)
    submit(world, ttft_target_s=1.0, patience_s=600.0)
    assert not world.ends


def test_an_ended_request_tells_what_was_predicted_for_it() -> None:
    world = world_with(Admission.OFF)
    submit(world, ttft_target_s=1.0, patience_s=600.0)
    world.run()
    report = world.ends[RequestId("r")].report
    assert report.predicted_ttft_s is not None
    assert report.predicted_ttft_s > 0
    assert report.predicted_tpot_s is not None


def test_those_who_wait_for_a_decode_worker_count_as_ahead() -> None:
    """Places become free once a second: behind five who wait, a target of two seconds cannot be met."""
    world = world_with(Admission.TTFT)
    prefill, decode = (world.registry.fleet.get(WorkerId(n)) for n in ("prefill-0", "decode-0"))
    assert prefill is not None
    assert decode is not None
    teach_prefill(prefill, 10_000.0)
    decode.refused()
    for index in range(5):
        world.submit(new_request(f"w{index}", arrived=world.now, deadline=world.now + 600))
    assert world.registry.num_waiting == 5
    submit(world, ttft_target_s=2.0, patience_s=600.0)
    assert isinstance(world.ends[RequestId("r")].outcome, Overloaded)
    assert world.registry.num_waiting == 5
