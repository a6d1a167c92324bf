"""Two workers live, and no KV gets from one to the other: that pair is avoided, neither worker is."""

from __future__ import annotations

from coordinator.fleet import Fleet, WorkerState
from coordinator.pairs import FIRST_S, LONGEST_S, PairQuarantine
from coordinator.router import Router
from pdserve.core.config import LocalPrefill, RoutingPolicy
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from tests.support.model_workers import worker_info

MODEL = "m"
P0, P1, D0, D1 = (WorkerId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"))


def fleet_of(prefill: int, decode: int) -> Fleet:
    fleet = Fleet()
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for index in range(count):
            fleet.add(WorkerState(info=worker_info(f"{role.value}-{index}", role), model=MODEL))
    return fleet


def broken(times: int, now: float = 10.0) -> PairQuarantine:
    pairs = PairQuarantine()
    for _ in range(times):
        now += pairs.failed(P0, D0, now)
    pairs.at(now - 0.001)
    return pairs


def test_one_failure_may_be_bad_luck_and_two_in_a_row_are_not() -> None:
    assert not broken(1).avoids(P0, D0)
    pairs = broken(2)
    assert pairs.avoids(P0, D0)
    assert not pairs.avoids(P0, D1)
    assert not pairs.avoids(P1, D0)
    assert pairs.bad() == [(P0, D0)]


def test_a_pair_is_tried_again_after_a_while_that_grows() -> None:
    pairs, now, waits = PairQuarantine(), 0.0, []
    for _ in range(12):
        waits.append(pairs.failed(P0, D0, now))
        now += waits[-1]
        pairs.at(now)
        assert not pairs.avoids(P0, D0)
    assert waits[:4] == [0.0, FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert waits[-1] == LONGEST_S


def test_what_was_under_way_when_a_pair_was_found_bad_does_not_count_again() -> None:
    pairs = PairQuarantine()
    pairs.failed(P0, D0, 0.0)
    pairs.failed(P0, D0, 0.0)
    for _ in range(50):
        assert pairs.failed(P0, D0, 0.5) <= FIRST_S
    pairs.at(FIRST_S)
    assert not pairs.avoids(P0, D0)


def test_a_transfer_that_arrives_clears_the_pair() -> None:
    pairs = broken(5)
    pairs.worked(P0, D0)
    assert not pairs.avoids(P0, D0)
    assert pairs.failed(P0, D0, 1000.0) == 0.0


def test_a_restarted_worker_is_met_without_prejudice() -> None:
    pairs = broken(5)
    pairs.forget(D0)
    assert not pairs.avoids(P0, D0)


def test_requests_go_around_a_bad_pair_and_both_workers_go_on_with_others() -> None:
    fleet = fleet_of(2, 2)
    router = Router(RoutingPolicy.RANDOM, seed=0, local_prefill=LocalPrefill.NEVER)
    for _ in range(2):
        fleet.pairs.failed(P0, D0, 1.0)
    fleet.pairs.at(1.5)
    seen = set()
    for _ in range(200):
        placement = router.place(fleet, MODEL, 100)
        assert placement is not None
        assert placement.prefill is not None
        seen.add((placement.prefill.worker, placement.decode.worker))
    assert seen == {(P1, D0), (P0, D1), (P1, D1)}


def test_a_decode_worker_that_nobody_reaches_reads_prompts_itself() -> None:
    fleet = fleet_of(1, 1)
    for _ in range(2):
        fleet.pairs.failed(P0, D0, 1.0)
    fleet.pairs.at(1.5)
    placement = Router(RoutingPolicy.POWER_OF_TWO, seed=0, local_prefill=LocalPrefill.NEVER).place(
        fleet, MODEL, 100
    )
    assert placement is not None
    assert placement.prefill is None
    fleet.pairs.at(100.0)
    again = Router(RoutingPolicy.POWER_OF_TWO, seed=0, local_prefill=LocalPrefill.NEVER).place(
        fleet, MODEL, 100
    )
    assert again is not None
    assert again.prefill is not None
