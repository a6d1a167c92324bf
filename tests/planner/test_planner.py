"""Plans follow demand and speeds; they are made when they clearly pay, and not to and fro."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from coordinator.fleet import Fleet
from coordinator.planner.capacity import (
    Speeds,
    decode_capacity,
    fleet_capacity,
    largest_batch,
    learned,
    prefill_capacity,
)
from coordinator.planner.demand import Demand, DemandTracker
from coordinator.planner.forecast import Forecast
from coordinator.planner.planner import Planner, PlannerRules
from coordinator.planner.proposal import Flip, Scale, Split, Standing
from coordinator.simulator.world import MODEL
from pdserve.core.messages import Role
from tests.support.planner_fleet import fleet_of

SPEEDS = Speeds(prefill=(0.0, 1e-4, 0.0), decode=(0.01, 1e-4, 0.0), max_seqs=64, max_context=1_000_000)
DEMAND = Demand(
    rate=10.0,
    rate_std=0.5,
    prompt=1000,
    prompt_square=1.5e6,
    context=1000,
    answer=100,
    ttft_s=1.0,
    tpot_s=0.014,
)


def told(planner: Planner, start: float, seconds: float, rate: float, prompt: int, answer: int) -> None:
    """Requests at an even rate, answered at once."""
    for index in range(int(seconds * rate)):
        now = start + index / rate
        planner.tracker.arrived(prompt, 1.0, 0.014, now)
        planner.tracker.answered(prompt, 0, answer, now)


def test_a_forecast_follows_a_trend_that_is_damped() -> None:
    forecast = Forecast()
    for value in range(0, 100, 5):
        forecast.observe(value)
    last = 95
    assert last - 5 < forecast.predict(1) < last + 5
    assert forecast.predict(1) < forecast.predict(20) < last + 20 * 5 / 2


def test_a_forecast_knows_the_season_after_some_of_them() -> None:
    plain, seasonal = Forecast(), Forecast(season=12)
    misses: dict[Forecast, float] = {plain: 0.0, seasonal: 0.0}
    for step in range(12 * 12):
        value = 50 + 40 * math.sin(2 * math.pi * step / 12)
        for forecast in misses:
            if step > 12 * 8:
                misses[forecast] += abs(forecast.predict(1) - value)
            forecast.observe(value)
    assert misses[seasonal] < 0.5 * misses[plain]


def test_the_error_bar_of_a_forecast_grows_with_the_distance_and_with_noise() -> None:
    steady, noisy = Forecast(), Forecast()
    for step in range(50):
        steady.observe(10.0)
        noisy.observe(10.0 + 5 * (-1) ** step)
    assert steady.std(1) == 0
    assert 0 < noisy.std(1) < noisy.std(5)


def test_demand_is_what_was_told_without_what_caches_have() -> None:
    tracker = DemandTracker(1.0)
    for index in range(100):
        now = index / 10
        tracker.arrived(1000, 0.5, None, now)
        tracker.answered(1000, 250, 40, now)
    demand = tracker.demand(1.0)
    assert demand is not None
    assert demand.rate == pytest.approx(10, rel=0.02)
    assert (demand.prompt, demand.context, demand.answer) == pytest.approx((750, 1000, 40))
    assert demand.ttft_s == pytest.approx(0.5)
    assert demand.tpot_s == math.inf


def test_two_prefill_workers_serve_more_than_twice_as_much_in_time_as_one() -> None:
    """One queue of several servers waits less at the same utilisation."""
    one, two = (prefill_capacity(SPEEDS, n, DEMAND) for n in (1, 2))
    assert 2 * one < two < 20  # 10 per worker and second at the very most
    assert prefill_capacity(SPEEDS, 2, replace(DEMAND, ttft_s=0.05)) == 0


def test_a_batch_grows_until_its_step_takes_the_target() -> None:
    batch = largest_batch(SPEEDS, DEMAND)
    assert 0.01 + 1e-4 * (batch + math.sqrt(batch)) == pytest.approx(0.014)
    assert decode_capacity(SPEEDS, 3, DEMAND) == pytest.approx(3 * batch / (100 * (0.01 + 1e-4 * batch)))
    assert largest_batch(replace(SPEEDS, max_context=10_500), DEMAND) == pytest.approx(9.5)
    assert largest_batch(SPEEDS, replace(DEMAND, tpot_s=0.009)) == 0


def test_the_slower_stage_is_the_limit_unless_decode_workers_help() -> None:
    split = Split(1, 4)
    read, written = prefill_capacity(SPEEDS, 1, DEMAND), decode_capacity(SPEEDS, 4, DEMAND)
    assert read < written
    assert fleet_capacity(SPEEDS, split, DEMAND, 0.0) == read
    assert read < fleet_capacity(SPEEDS, split, DEMAND, 0.5) < written


def test_speeds_are_learned_from_workers_of_both_roles() -> None:
    speeds = learned(fleet_of(2, 2))
    assert speeds is not None
    assert speeds.prefill[1] == pytest.approx(1e-4, rel=0.05)
    assert speeds.decode[0] == pytest.approx(0.01, rel=0.05)
    assert learned(fleet_of(2, 0)) is None


def planner(**rules: object) -> Planner:
    base = PlannerRules(interval_s=1.0, dwell_s=20.0, local_share=0.0)
    return Planner(MODEL, replace(base, **rules))  # type: ignore[arg-type]  # a test's shorthand


def test_long_prompts_turn_decode_workers_into_prefill_workers_after_confirmation() -> None:
    plans, fleet = planner(), fleet_of(1, 3)
    told(plans, 0.0, 10.0, rate=15, prompt=1000, answer=10)
    first = plans.plan(fleet, 10.0)
    assert first.standing is Standing.PROPOSED
    assert first.wanted.prefill > 1
    told(plans, 10.0, 1.0, rate=15, prompt=1000, answer=10)
    again = plans.plan(fleet, 11.0)
    assert again.standing is Standing.ACTED
    assert isinstance(again.change, Flip)
    assert again.change.to is Role.PREFILL
    assert again.gain - again.uncertainty > 0.02
    plans.changed(11.0)
    standings = []
    for second in range(11, 33):
        told(plans, float(second), 1.0, rate=15, prompt=1000, answer=10)
        standings.append(plans.plan(fleet, second + 1.0).standing)
    assert set(standings[:-3]) == {Standing.PROPOSED}, "the last change is given its dwell time"
    assert Standing.ACTED in standings[-3:]


def test_a_fleet_that_suits_its_load_is_left_alone() -> None:
    plans, fleet = planner(), fleet_of(2, 2)
    for second in range(60):
        told(plans, float(second), 1.0, rate=8 + second % 3, prompt=1000, answer=100)
        proposal = plans.plan(fleet, second + 1.0)
        assert proposal.standing in (Standing.KEEP, Standing.UNKNOWN), str(proposal)


def test_what_no_fleet_can_do_is_said_plainly() -> None:
    plans, fleet = planner(), fleet_of(2, 2)
    told(plans, 0.0, 10.0, rate=5, prompt=20_000, answer=10)
    proposal = plans.plan(fleet, 10.0)
    assert proposal.standing is Standing.INFEASIBLE
    assert "TTFT target is 1000 ms" in proposal.reason
    over = planner()
    told(over, 0.0, 10.0, rate=500, prompt=1000, answer=100)
    seen = [over.plan(fleet, 10.0 + i) for i in range(2)]
    assert all(p.capacity < p.rate for p in seen)
    assert seen[-1].standing is Standing.INFEASIBLE
    assert "even" in seen[-1].reason


def test_a_budget_lets_a_fleet_grow_and_shrink() -> None:
    plans, fleet = planner(scales=True, budget=8), fleet_of(1, 1)
    told(plans, 0.0, 10.0, rate=20, prompt=1000, answer=100)
    proposal = plans.plan(fleet, 10.0)
    assert proposal.standing is Standing.PROPOSED
    assert isinstance(proposal.change, Scale)
    assert proposal.change.by > 0
    assert proposal.wanted.total <= 8
    idle = planner(scales=True, budget=8)
    told(idle, 0.0, 10.0, rate=1, prompt=100, answer=10)
    shrinking = idle.plan(fleet_of(3, 3), 10.0)
    assert shrinking.wanted == Split(1, 1)
    assert isinstance(shrinking.change, Scale)
    assert shrinking.change.by < 0


def test_without_knowledge_nothing_is_proposed() -> None:
    plans = planner()
    assert plans.plan(fleet_of(1, 1), 5.0).standing is Standing.UNKNOWN
    told(plans, 5.0, 5.0, rate=5, prompt=100, answer=10)
    assert plans.plan(Fleet(), 10.0).standing is Standing.UNKNOWN
