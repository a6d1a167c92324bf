"""The search finds a capacity that is known, and says how sure it is."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from pdserve.bench.scenario import Search
from pdserve.bench.search import GoodputSearch, at_least, crossing, falling_fit
from pdserve.bench.statistics import correlation_time, percentiles, wilson

SERVICE_S, LIMIT_S = 0.1, 0.5


def queue(rate: float, num: int, seed: int) -> list[bool]:
    """A server of 100 ms per request, one at a time (M/D/1): who waits less than 400 ms meets the target."""
    random = np.random.default_rng(seed)
    at = free_at = 0.0
    met = []
    for gap in random.exponential(1 / rate, size=num):
        at += float(gap)
        free_at = max(free_at, at) + SERVICE_S
        met.append(free_at - at <= LIMIT_S)
    return met


TRIAL_S = 60.0


@functools.cache
def true_capacity(goal: float) -> float:
    """Of many trials as long as the search's: each begins with an empty queue."""
    rates = np.arange(5.0, 9.0, 0.1)
    shares = [np.mean([np.mean(queue(rate, int(rate * TRIAL_S), s)) for s in range(40)]) for rate in rates]
    return float(rates[max(index for index, share in enumerate(shares) if share >= goal)])


def searched(settings: Search, seed: int) -> GoodputSearch:
    search = GoodputSearch(settings)
    for number in itertools.count():
        rate = search.next_rate()
        if rate is None:
            return search
        search.tell(rate, queue(rate, max(1, int(rate * TRIAL_S)), seed * 1000 + number), TRIAL_S)
    raise AssertionError


def test_the_search_finds_a_known_capacity_and_its_interval_holds_it() -> None:
    truth = true_capacity(0.9)
    settings = Search(start_rate=1.0, goal=0.9, budget_s=1500, precision=0.05)
    found = [searched(settings, seed).estimate(0.9) for seed in range(20)]
    rates = [goodput.rate for goodput in found if goodput.rate is not None]
    assert len(rates) == 20
    assert np.median(rates) == pytest.approx(truth, rel=0.08)
    assert sum((g.low or 0) <= truth <= (g.high or 99) for g in found) >= 17
    assert np.median([(g.high or 99) / (g.low or 1) for g in found]) < 1.5


@pytest.mark.parametrize("start", [0.5, 60.0])
def test_it_gets_there_from_below_and_from_above(start: float) -> None:
    rate = searched(Search(start_rate=start, budget_s=1500), 3).estimate(0.9).rate
    assert rate == pytest.approx(true_capacity(0.9), rel=0.15)


def test_a_higher_attainment_is_met_at_a_lower_rate() -> None:
    search = searched(Search(start_rate=2.0, budget_s=2000), 5)
    rates = [search.estimate(goal).rate for goal in (0.9, 0.95, 0.99)]
    assert all(rate is not None for rate in rates)
    assert rates == sorted(rates, reverse=True)  # type: ignore[type-var]  # none is None


def test_it_stops_when_its_time_is_up() -> None:
    search = searched(Search(start_rate=1.0, budget_s=200), 1)
    assert search.spent_s <= 200 + 60


def test_an_unclear_rate_is_tried_again_before_it_is_believed() -> None:
    search = GoodputSearch(Search(start_rate=1.0, goal=0.9))
    search.tell(1.0, [True] * 18 + [False] * 2, 1)
    assert search.next_rate() == 1.0


def test_a_server_that_never_meets_its_targets_has_no_goodput() -> None:
    search = GoodputSearch(Search(start_rate=1.0))
    while (rate := search.next_rate()) is not None:
        search.tell(rate, [False] * 30, 1)
    assert search.estimate(0.9).rate is None
    assert min(point.rate for point in search.points()) < 0.01


def test_a_server_without_limit_ends_at_the_highest_rate() -> None:
    search = GoodputSearch(Search(start_rate=1.0, max_rate=40))
    while (rate := search.next_rate()) is not None:
        search.tell(rate, [True] * 50, 1)
    assert search.points()[-1].rate == 40
    assert search.estimate(0.9).rate is None


def test_what_is_known_of_a_search_that_ended_early_is_the_highest_rate_that_was_met() -> None:
    search = GoodputSearch(Search(start_rate=1.0, goal=0.9))
    for rate in (1.0, 2.0):
        search.tell(rate, [True] * 40, 10.0)
    assert search.estimate(0.9).rate is None
    assert at_least(search.estimate(0.9), search.points()) == 2.0
    search.tell(4.0, [False] * 40, 10.0)
    found = at_least(search.estimate(0.9), search.points())
    assert found == search.estimate(0.9).rate
    never = GoodputSearch(Search(start_rate=1.0, goal=0.9))
    never.tell(1.0, [False] * 40, 10.0)
    assert at_least(never.estimate(0.9), never.points()) is None


def test_the_crossing_lies_between_the_rates_around_it() -> None:
    found = crossing([1, 2, 4], [1.0, 1.0, 0.5], [9, 9, 9], 0.75)
    assert found.rate == pytest.approx(2 * 2**0.5)
    assert crossing([1, 2], [0.5, 0.4], [1, 1], 0.9).below
    assert crossing([1, 2], [1.0, 0.95], [1, 1], 0.9).rate is None


def test_the_fit_never_rises_and_keeps_the_mean() -> None:
    fit = falling_fit([0.8, 1.0, 0.9, 0.2, 0.3], [1, 3, 1, 1, 1])
    assert all(a >= b for a, b in itertools.pairwise(fit))
    assert np.average(fit, weights=[1, 3, 1, 1, 1]) == pytest.approx(
        np.average([0.8, 1.0, 0.9, 0.2, 0.3], weights=[1, 3, 1, 1, 1])
    )


def test_wilson_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = [
        low <= 0.93 <= high for n in random.binomial(60, 0.93, 2000) for low, high in [wilson(int(n), 60)]
    ]
    assert 0.92 <= np.mean(held) <= 0.985
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[0] > 0.7


def test_requests_that_miss_together_count_for_fewer() -> None:
    together = ([True] * 45 + [False] * 5) * 4
    random = np.random.default_rng(1)
    alone = [bool(value) for value in random.random(200) < 0.9]
    assert (correlation_time(together) or 0) > 3
    assert (correlation_time(alone) or 9) < 2
    assert correlation_time([True] * 30) is None


def test_percentiles_are_named_and_none_come_from_nothing() -> None:
    assert percentiles([]) == {}
    assert percentiles([1.0, 3.0])["p50"] == 2.0
