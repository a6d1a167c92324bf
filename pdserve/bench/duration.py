"""How long a run takes at most, before it begins."""

from __future__ import annotations

from typing import Final

from pdserve.bench.load import LEAD_S
from pdserve.bench.scenario import Scenario

MAX_STRETCH: Final = 3.0
"""A trial is at most so many times as long as the scenario says."""
_WARM_UP_S: Final = 3.0


def before_all(scenario: Scenario) -> Scenario:
    """What every system gets once, before anything is measured."""
    short_s = min(_WARM_UP_S, scenario.duration_s)
    return scenario.model_copy(update={"duration_s": short_s, "warmup_s": 0.0})


def long_enough(scenario: Scenario, rate: float) -> Scenario:
    """A slow rate takes longer to show anything: at least `min_requests`, within bounds."""
    needed_s = min(scenario.min_requests / rate, MAX_STRETCH * scenario.duration_s)
    return scenario.model_copy(update={"duration_s": max(scenario.duration_s, needed_s)})


def longest_trial_s(scenario: Scenario, rate: float) -> float:
    """With answers that take as long as they may."""
    trial = long_enough(scenario, rate)
    return LEAD_S + trial.warmup_s + trial.duration_s + trial.drain_s


def longest_run_s(scenario: Scenario) -> float:
    """Without starting and stopping servers."""
    if scenario.rates:
        each_s = scenario.rounds * sum(longest_trial_s(scenario, rate) for rate in scenario.rates)
    else:
        stretched_s = LEAD_S + scenario.warmup_s + MAX_STRETCH * scenario.duration_s + scenario.drain_s
        # The search (its first trial is made in any case), then one at the rate of all.
        each_s = max(scenario.search.budget_s, stretched_s) + stretched_s
    return len(scenario.systems) * (LEAD_S + before_all(scenario).duration_s + scenario.drain_s + each_s)
