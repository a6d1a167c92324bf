"""A planner that may add and retire workers, under loads that grow and shrink; time is virtual."""

from __future__ import annotations

from dataclasses import replace

from coordinator.planner.limits import Limits
from coordinator.planner.planner import PlannerRules
from coordinator.simulator.world import World
from pdserve.core.errors import PdServeError
from tests.simulator.test_flips import SETUP, load

RULES = PlannerRules(interval_s=2.0, dwell_s=4.0, local_share=0.0, scales=True)
GROWING = replace(SETUP, prefill=1, decode=1, planner=RULES, limits=Limits(budget_workers=6), start_s=5.0)


def test_a_fleet_grows_with_its_load_and_shrinks_again_and_no_answer_is_broken() -> None:
    arrivals = (
        load(0.0, 20.0, 4.0, 400, 50) + load(20.0, 40.0, 40.0, 400, 50) + load(60.0, 60.0, 2.0, 400, 50)
    )
    world = World(GROWING, arrivals)
    run = world.run()
    grown = [text for _, text in run.flips if ": +" in text]
    shrunk = [text for _, text in run.flips if ": -1" in text]
    assert grown
    assert shrunk
    answered = [e for e in run.ended if not isinstance(e.outcome, PdServeError)]
    assert len(run.ended) == len(arrivals)
    assert all(e.report.output_tokens == e.arrival.output_tokens for e in answered)
    assert all(e.report.attempts == 1 for e in answered)
    late = [e for e in run.ended if 40 < e.arrival.at_s < 60]
    assert sum(not isinstance(e.outcome, PdServeError) for e in late) > 0.9 * len(late)
    fixed = World(replace(GROWING, planner=None, prefill=3, decode=3), arrivals).run()
    assert run.worker_hours < 0.8 * fixed.worker_hours


def test_a_fleet_stays_within_its_devices() -> None:
    arrivals = load(0.0, 40.0, 60.0, 400, 50)
    limits = Limits(budget_devices=5.0, decode_devices=2.0, max_prefill=2)
    world = World(replace(GROWING, limits=limits), arrivals)
    world.run()
    sizes = [state.info.role.value for state in world.registry.fleet]
    assert sizes.count("prefill") + 2 * sizes.count("decode") <= 5
    assert len(sizes) > 2
