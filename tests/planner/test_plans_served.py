"""Plans of a running coordinator: shown to operators, told to metrics, and made where they may be."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from coordinator.events import ChangeWorkerRole, Event
from coordinator.fleet import Fleet
from coordinator.metrics import Metrics
from coordinator.planner.control import PlannerControl
from coordinator.planner.proposal import Standing
from coordinator.report import Report
from coordinator.simulator.world import MODEL
from pdserve.client.admin import plan
from pdserve.core.config import CoordinatorSettings, LocalPrefill
from pdserve.core.ids import RequestId
from pdserve.core.messages import FinishReason, Role
from pdserve.core.operation_settings import PlannerMode, PlannerSettings
from tests.support.deployment import deployed, scenario
from tests.support.planner_fleet import fleet_of
from tests.support.registry_world import new_request


def control(mode: PlannerMode) -> tuple[PlannerControl, Metrics]:
    metrics = Metrics()
    settings = PlannerSettings(mode=mode, interval_s=1.0, dwell_s=5.0)
    return PlannerControl(
        [MODEL], settings, CoordinatorSettings(local_prefill=LocalPrefill.NEVER), metrics
    ), metrics


def long_prompts(plans: PlannerControl, seconds: int, fleet: Fleet | None = None) -> list[Event]:
    """15 a second, of 1,000 tokens; to one prefill and three decode workers where nothing else is said."""
    fleet, events = fleet or fleet_of(1, 3), list[Event]()
    for index in range(seconds * 15):
        now = index / 15
        request = new_request(f"r{index}", prompt=[1] * 1000, ttft_target_s=1.0)
        report = Report(
            id=RequestId(f"r{index}"),
            model=MODEL,
            tenant="",
            priority=0,
            prompt_tokens=1000,
            output_tokens=10,
            attempts=1,
            e2e_s=1.0,
            queue_s=0.0,
        )
        plans.arrived([dataclasses.replace(request, model=MODEL)], now)
        plans.ended(report, FinishReason.LENGTH, now)
        events += plans.ticked(fleet, now)
    return events


def test_an_active_planner_changes_a_role_and_an_advisory_one_only_says_so() -> None:
    active, metrics = control(PlannerMode.ACTIVE)
    changes = [e for e in long_prompts(active, 9) if isinstance(e, ChangeWorkerRole)]
    assert changes
    assert changes[0].role is Role.PREFILL
    advisory, _ = control(PlannerMode.ADVISORY)
    assert long_prompts(advisory, 9) == []
    (proposal,) = advisory.proposals()
    assert proposal.standing is Standing.PROPOSED
    assert proposal.wanted.prefill > proposal.now.prefill
    wanted = metrics.registry.get_sample_value(
        "pdserve_planner_wanted_workers", {"model": MODEL, "role": "prefill"}
    )
    assert wanted == pytest.approx(active.proposals()[0].wanted.prefill)


@scenario
async def test_operators_see_the_plan(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        answer = await asyncio.to_thread(plan, system.address)
        assert answer.mode == "advisory"
        async with asyncio.timeout(10):
            while not answer.proposals:
                await system.client.generate(prompt_token_ids=[1, 2, 3], max_tokens=2)
                answer = await asyncio.to_thread(plan, system.address)
        (one,) = answer.proposals
        assert one.standing == "unknown"  # nothing was asked when it was made
        assert one.reason
