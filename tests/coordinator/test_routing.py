"""Who gets a request, and the reasons given."""

from __future__ import annotations

import pytest

from coordinator.decisions import Candidate
from coordinator.fleet import Fleet, WorkerState
from coordinator.policies import make_policy
from coordinator.router import Router
from pdserve.core.config import LocalPrefill, RoutingPolicy
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.messages import Role
from tests.support.model_workers import ModelDecode, worker_info

MODEL = "m"


def candidates(**scores: float) -> list[Candidate]:
    return [Candidate(WorkerId(name), score) for name, score in sorted(scores.items())]


def fleet_of(prefill: int, decode: int) -> Fleet:
    fleet = Fleet()
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for index in range(count):
            fleet.add(WorkerState(info=worker_info(f"{role.value}-{index}", role), model=MODEL))
    return fleet


def worker(fleet: Fleet, name: str) -> WorkerState:
    state = fleet.get(WorkerId(name))
    assert state is not None
    return state


def attempt(index: int) -> AttemptId:
    return AttemptId(RequestId(f"r{index}"), 0)


@pytest.mark.parametrize("policy", list(RoutingPolicy))
def test_the_same_seed_gives_the_same_choices(policy: RoutingPolicy) -> None:
    def choices(seed: str) -> list[str]:
        made = make_policy(policy, seed)
        return [made.choose(candidates(a=3.0, b=1.0, c=2.0, d=1.0)).worker for _ in range(40)]

    assert choices("1") == choices("1")


def test_least_loaded_takes_the_lowest_score_and_the_first_among_equals() -> None:
    policy = make_policy(RoutingPolicy.LEAST_LOADED, "0")
    assert policy.choose(candidates(a=2.0, b=1.0, c=1.0)).worker == "b"


def test_round_robin_takes_turns_while_workers_come_and_go() -> None:
    policy = make_policy(RoutingPolicy.ROUND_ROBIN, "0")
    rounds = [candidates(a=9.0, b=0.0, c=0.0)] * 4 + [candidates(a=0.0, c=0.0)] * 2
    assert [policy.choose(c).worker for c in rounds] == ["a", "b", "c", "a", "c", "a"]


def test_power_of_two_never_takes_the_worst_and_spreads_over_the_rest() -> None:
    policy = make_policy(RoutingPolicy.POWER_OF_TWO, "0")
    taken = [policy.choose(candidates(a=1.0, b=2.0, c=3.0, d=4.0)).worker for _ in range(200)]
    assert set(taken) == {"a", "b", "c"}
    assert taken.count(WorkerId("a")) > taken.count(WorkerId("b")) > taken.count(WorkerId("c"))


def test_random_reaches_everyone() -> None:
    policy = make_policy(RoutingPolicy.RANDOM, "0")
    assert {policy.choose(candidates(a=1.0, b=9.0)).worker for _ in range(50)} == {"a", "b"}


def test_a_choice_explains_itself() -> None:
    router = Router(RoutingPolicy.LEAST_LOADED, seed=0)
    placement = router.place(fleet_of(1, 2), MODEL, 100)
    assert str(placement) == (
        "decode decode-0 (least loaded; decode-0=0.4688, decode-1=0.4688); "
        "prefill prefill-0 (least loaded; prefill-0=0.1)"
    )


def test_prefill_goes_where_the_prompt_is_read_soonest() -> None:
    fleet = fleet_of(2, 1)
    router = Router(RoutingPolicy.LEAST_LOADED, seed=0, local_prefill=LocalPrefill.NEVER)
    worker(fleet, "prefill-0").place_prefill(attempt(0), 500)
    worker(fleet, "prefill-1").place_prefill(attempt(1), 900)
    worker(fleet, "prefill-1").tokens_per_s = 4000.0
    placement = router.place(fleet, MODEL, 100)
    assert placement is not None
    assert placement.prefill is not None
    assert placement.prefill.worker == "prefill-1"


def test_decode_goes_where_batch_and_blocks_have_room() -> None:
    fleet = fleet_of(0, 2)
    router = Router(RoutingPolicy.LEAST_LOADED, seed=0)
    worker(fleet, "decode-0").place_decode(attempt(0), 200)
    placement = router.place(fleet, MODEL, 10)
    assert placement is not None
    assert placement.decode.worker == "decode-1"
    assert placement.prefill is None


def test_blocks_that_others_hold_count_as_load() -> None:
    fleet = fleet_of(0, 2)
    busy = ModelDecode(worker_info("decode-0", Role.DECODE))
    busy.free = busy.free[:4]
    worker(fleet, "decode-0").heard(busy.heartbeat())
    assert worker(fleet, "decode-0").decode_load(4) > worker(fleet, "decode-1").decode_load(4) + 0.9


def test_load_returns_to_nothing_when_attempts_leave() -> None:
    state = worker(fleet_of(0, 1), "decode-0")
    idle = state.decode_load(1)
    for index in range(5):
        state.place_decode(attempt(index), 10 * index)
        state.place_prefill(attempt(index), 100)
        state.prefill_reached(attempt(index), 40)
    for index in range(5):
        state.release(attempt(index))
        state.release(attempt(index))
    assert state.decode_load(1) == idle
    assert state.prefill_wait_s(0) == 0.0


@pytest.mark.parametrize("why", ["draining", "down", "full"])
def test_workers_that_take_nothing_get_nothing(why: str) -> None:
    fleet = fleet_of(1, 1)
    state = worker(fleet, "decode-0")
    match why:
        case "draining":
            state.draining = True
        case "down":
            state.up = False
        case _:
            state.refused()
    assert Router(RoutingPolicy.RANDOM, seed=0).place(fleet, MODEL, 1) is None


def test_a_worker_that_failed_a_request_is_taken_again_only_when_it_is_alone() -> None:
    fleet = fleet_of(0, 2)
    router = Router(RoutingPolicy.RANDOM, seed=0)
    for _ in range(20):
        placement = router.place(fleet, MODEL, 1, avoid={WorkerId("decode-0")})
        assert placement is not None
        assert placement.decode.worker == "decode-1"
    worker(fleet, "decode-1").up = False
    placement = router.place(fleet, MODEL, 1, avoid={WorkerId("decode-0")})
    assert placement is not None
    assert placement.decode.worker == "decode-0"


def test_models_do_not_share_workers() -> None:
    assert Router(RoutingPolicy.RANDOM, seed=0).place(fleet_of(1, 1), "another", 1) is None
