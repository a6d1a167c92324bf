"""Compare finds real regressions, and does not find those that are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from pdserve.bench.compare import Change, Unit, compare, select
from pdserve.bench.report.files import Measured
from pdserve.core.errors import ConfigError


def run_of(
    seed: int,
    *,
    rounds: int,
    per_round: int = 40,
    slower: float = 1.0,
    drift: float = 0.05,
    system: str = "x",
) -> list[Measured]:
    """Requests that wait on each other (AR(1)), in rounds on a machine that is never quite the same.

    What a request asks for depends on its place alone, as with one seed; noise depends on `seed`.
    """
    random, work = np.random.default_rng(seed), np.random.default_rng(0)
    out = []
    for number in range(rounds):
        machine = drift * random.standard_normal()
        wait = 0.0
        for index in range(per_round):
            wait = 0.7 * wait + 0.15 * random.standard_normal()
            size = math.exp(0.5 * work.standard_normal())
            ttft_s = 0.3 * size * math.exp(machine + wait) * slower
            tpot_s = 0.05 * math.exp(machine + 0.05 * random.standard_normal()) * slower
            out.append(
                Measured(
                    system=system,
                    rate=2.0,
                    round=number,
                    session=index,
                    turn=0,
                    intended_s=index * 0.5,
                    met=ttft_s < 0.6,
                    ttft_s=ttft_s,
                    tpot_s=tpot_s,
                    itl_p99_s=tpot_s * 1.5,
                    e2e_s=ttft_s + 20 * tpot_s,
                )
            )
    return out


def false_alarms(rounds: int, trials: int, drift: float) -> int:
    return sum(
        compare(
            run_of(2 * seed, rounds=rounds, drift=drift),
            run_of(2 * seed + 1, rounds=rounds, drift=drift),
            min_effect=0.0,
        ).regressed
        for seed in range(trials)
    )


def test_equal_runs_are_called_different_no_more_often_than_promised() -> None:
    # Worse is one half of different: at most 5% together, so 2.5% here; 8 of 120 would be 6.7%.
    assert false_alarms(8, 120, drift=0.05) <= 8


def test_neighbours_that_wait_together_raise_no_alarm_within_one_round() -> None:
    assert false_alarms(1, 120, drift=0.0) <= 9


def test_a_quarter_slower_is_found_and_measured() -> None:
    found = [compare(run_of(s, rounds=8), run_of(s + 500, rounds=8, slower=1.25)) for s in range(10)]
    assert sum(comparison.regressed for comparison in found) >= 9
    tpot = next(one for one in found[0].outcomes if one.metric == "tpot")
    assert tpot.effect == pytest.approx(0.25, abs=0.1)
    assert found[0].unit is Unit.ROUND


def test_faster_is_better_and_no_regression() -> None:
    found = compare(run_of(1, rounds=8), run_of(2, rounds=8, slower=0.7))
    assert not found.regressed
    assert {one.change for one in found.outcomes if one.metric == "tpot"} == {Change.BETTER}


def test_a_difference_too_small_to_matter_is_let_pass() -> None:
    before = run_of(1, rounds=8, drift=0.0)
    after = [_scaled(one, 1.01) for one in before]
    assert not compare(before, after, min_effect=0.03).regressed
    assert compare(before, after, min_effect=0.0).regressed


def test_a_run_equal_to_itself_shows_nothing() -> None:
    same = run_of(1, rounds=8)
    found = compare(same, same, min_effect=0.0)
    assert {one.change for one in found.outcomes} == {Change.NONE}
    assert {one.effect for one in found.outcomes} == {0.0}


def test_requests_that_fail_only_after_the_change_are_a_regression() -> None:
    before = run_of(1, rounds=8)
    after = [_failed(one) if one.session % 3 == 0 else one for one in before]
    found = compare(before, after)
    assert found.regressed
    attainment = next(one for one in found.outcomes if one.metric == "attainment")
    assert attainment.change is Change.WORSE


def test_runs_without_common_requests_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="--rounds"):
        compare(run_of(1, rounds=1, per_round=3), run_of(1, rounds=1, per_round=3))
    with pytest.raises(ConfigError, match="0 requests in common"):
        compare(run_of(1, rounds=2), [_scaled(one, 1.0, rate=9.0) for one in run_of(1, rounds=2)])


def test_what_only_one_has_is_counted() -> None:
    found = compare(run_of(1, rounds=8), run_of(2, rounds=8)[:-10])
    assert found.num_unpaired == 10


def test_one_of_several_systems_must_be_named() -> None:
    both: Sequence[Measured] = [*run_of(1, rounds=1), *run_of(1, rounds=1, system="y")]
    assert {one.system for one in select(both, "y", "A")} == {"y"}
    with pytest.raises(ConfigError, match="--system"):
        select(both, None, "A")
    with pytest.raises(ConfigError, match="no system 'z'"):
        select(both, "z", "A")


def _scaled(one: Measured, factor: float, *, rate: float | None = None) -> Measured:
    return Measured(
        system=one.system,
        rate=one.rate if rate is None else rate,
        round=one.round,
        session=one.session,
        turn=one.turn,
        intended_s=one.intended_s,
        met=one.met,
        ttft_s=(one.ttft_s or 0) * factor,
        tpot_s=(one.tpot_s or 0) * factor,
        itl_p99_s=(one.itl_p99_s or 0) * factor,
        e2e_s=(one.e2e_s or 0) * factor,
    )


def _failed(one: Measured) -> Measured:
    return Measured(
        system=one.system,
        rate=one.rate,
        round=one.round,
        session=one.session,
        turn=one.turn,
        intended_s=one.intended_s,
        met=False,
        ttft_s=None,
        tpot_s=None,
        itl_p99_s=None,
        e2e_s=None,
    )
