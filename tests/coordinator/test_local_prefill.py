"""When a decode worker reads a prompt itself although there is a prefill worker, and when it does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from coordinator.decisions import Placement
from coordinator.fleet import Fleet
from coordinator.latency import LatencyModel
from coordinator.router import Router
from coordinator.sla import Goal
from pdserve.core.config import LocalPrefill, RoutingPolicy
from pdserve.core.messages import Role
from tests.support.model_workers import ModelDecode, worker_info
from tests.support.taught_pair import MODEL, PROMPT, READ_S, attempt, pair, queue_at, run_at


def placed(
    fleet: Fleet, goal: Goal | None = None, local_prefill: LocalPrefill = LocalPrefill.AUTO
) -> Placement:
    router = Router(RoutingPolicy.POWER_OF_TWO, 0, local_prefill)
    placement = router.place(fleet, MODEL, PROMPT, goal=goal or Goal())
    assert placement is not None
    return placement


def burst(fleet: Fleet, count: int, local_prefill: LocalPrefill, **goal: float) -> Counter[str]:
    """Prompts that come at once; who reads how many."""
    router, readers = Router(RoutingPolicy.POWER_OF_TWO, 0, local_prefill), Counter[str]()
    for index in range(count):
        placement = router.place(fleet, MODEL, PROMPT, goal=Goal(**goal))
        assert placement is not None
        reader = placement.decode.worker if placement.prefill is None else placement.prefill.worker
        readers[reader] += 1
        decode, read_by = fleet.get(placement.decode.worker), fleet.get(reader)
        assert decode is not None
        assert read_by is not None
        decode.place_decode(attempt(f"b{index}"), PROMPT, goal.get("tpot_s"))
        decode.reserved(attempt(f"b{index}"))
        read_by.place_prefill(attempt(f"b{index}"), PROMPT)
    return readers


def test_a_burst_at_an_idle_pair_is_shared_between_both() -> None:
    readers = burst(pair()[2], 16, LocalPrefill.AUTO)
    assert 5 <= readers["decode-0"] <= 8
    assert readers["prefill-0"] == 16 - readers["decode-0"]


@pytest.mark.parametrize("policy", list(RoutingPolicy))
def test_every_policy_shares_it(policy: RoutingPolicy) -> None:
    prefill, _, fleet = pair()
    queue_at(prefill, 6)
    placement = Router(policy, 0).place(fleet, MODEL, PROMPT)
    assert placement is not None
    assert placement.prefill is None
    assert "cheaper" in str(placement)


@pytest.mark.parametrize(("setting", "by_decode"), [(LocalPrefill.NEVER, 0), (LocalPrefill.ALWAYS, 16)])
def test_it_can_be_forbidden_or_demanded(setting: LocalPrefill, by_decode: int) -> None:
    assert burst(pair()[2], 16, setting)["decode-0"] == by_decode


def test_an_idle_prefill_worker_reads_what_comes() -> None:
    _, decode, fleet = pair()
    assert placed(fleet).prefill is not None
    run_at(decode, 3)
    assert placed(fleet).prefill is not None


@pytest.mark.parametrize(("decoding", "queued", "local"), [(8, 2, False), (8, 8, True), (40, 8, False)])
def test_the_more_answers_would_pause_the_longer_the_queue_must_be(
    decoding: int, queued: int, local: bool
) -> None:
    prefill, decode, fleet = pair()
    run_at(decode, decoding)
    queue_at(prefill, queued)
    assert (placed(fleet).prefill is None) == local


def test_answers_whose_tpot_target_would_be_missed_are_not_paused() -> None:
    """With one answer a step takes 18 ms; reading 0.18 s within 32 tokens makes that 24 ms."""
    for target_s, local in ((0.022, False), (0.03, True)):
        prefill, decode, fleet = pair()
        run_at(decode, 1, tpot_target_s=target_s)
        queue_at(prefill, 8)
        placement = placed(fleet)
        assert (placement.prefill is None) == local, placement
        assert (max(route.violation for route in placement.routes) > 0) != local


def test_a_ttft_target_that_the_queue_would_miss_is_met_by_reading_at_once() -> None:
    prefill, decode, fleet = pair()
    run_at(decode, 6)
    queue_at(prefill, 3)
    assert placed(fleet).prefill is not None
    assert placed(fleet, Goal(ttft_s=0.4, due=0.4)).prefill is None


def test_where_moving_takes_longer_than_reading_even_an_idle_prefill_worker_is_passed_over() -> None:
    prefill, decode, fleet = pair()
    for _ in range(20):
        prefill.latency.exposed.learn((1, PROMPT * decode.kv_token_bytes), 2.0)
    placement = placed(fleet)
    assert placement.prefill is None
    local, remote = placement.routes
    assert remote.exposed_s == pytest.approx(2.0, rel=0.1)
    assert local.cost < remote.cost


def test_a_prediction_comes_with_its_error_bars() -> None:
    route = placed(pair()[2]).route
    assert route is not None
    assert route.ttft_s == pytest.approx(READ_S, rel=0.1)
    assert 0 < route.ttft_std_s < route.ttft_s
    assert route.tpot_s == pytest.approx(0.018, rel=0.2)
    assert 0 < route.tpot_std_s < route.tpot_s


def test_what_a_decode_worker_reads_in_between_does_not_spoil_what_is_known_of_its_steps() -> None:
    model = LatencyModel()
    beat = replace(
        ModelDecode(worker_info("decode-0", Role.DECODE)).heartbeat(), running=4, waiting_tokens=640
    )
    busy_s, now = 0.0, 0.0
    for index in range(1, 40):
        reads = index % 3 == 0
        if reads:
            model.prompt_sent(attempt(f"r{index}"), PROMPT, now)
            now += READ_S + 0.027
            model.prompt_read(attempt(f"r{index}"), now)
        busy_s += 10 * 0.027 + READ_S * reads
        now += 0.5
        model.heard(replace(beat, steps=10 * index, busy_s=busy_s))
    assert model.step_s(4, 640) == pytest.approx(0.027, rel=0.01)
    assert model.reading_adds_s == pytest.approx(READ_S / 30, rel=0.6)
    assert model.prefill.predict((1, PROMPT, PROMPT * PROMPT / 2)) == pytest.approx(READ_S, rel=0.05)
