"""From one number of workers to another: roles change first, then workers are started or drained."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.events import ChangeWorkerRole
from coordinator.fleet import Fleet
from coordinator.metrics import Metrics
from coordinator.planner.control import PlannerControl
from coordinator.planner.limits import Limits
from coordinator.planner.proposal import Split
from coordinator.planner.resizing import ChangeState, Resizing, WorkerChange, in_use
from coordinator.simulator.world import MODEL
from pdserve.client.admin import scale
from pdserve.core.config import CoordinatorSettings, LocalPrefill
from pdserve.core.errors import ConfigError, InvalidRequest
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import PlannerMode, PlannerSettings
from tests.planner.test_plans_served import long_prompts
from tests.support.deployment import deployed, scenario
from tests.support.planner_fleet import fleet_of


@dataclass
class FakeScaler:
    """Notes what it is asked for; `under_way` says what has become of it."""

    added: list[Role] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    under_way: list[WorkerChange] = field(default_factory=list)
    failures: int = 0
    size: float = 1.0

    def devices(self, model: str, role: Role) -> float:
        return self.size

    def add(self, model: str, role: Role) -> WorkerId:
        self.added.append(role)
        return WorkerId(f"{role.value}-{100 + len(self.added)}")

    def retire(self, model: str, worker: WorkerId, role: Role) -> None:
        self.retired.append(worker)

    def changes(self) -> Sequence[WorkerChange]:
        return self.under_way

    def num_failed(self, model: str) -> int:
        return self.failures


def resizing(scaler: FakeScaler, **settings: object) -> Resizing:
    return Resizing(scaler, PlannerSettings.model_validate(settings), {MODEL: MODEL})


def starting(role: Role) -> WorkerChange:
    return WorkerChange(worker=WorkerId("new-9"), model=MODEL, role=role, state=ChangeState.STARTING)


def test_missing_workers_are_started_and_the_idlest_ones_too_many_retired() -> None:
    scaler, fleet = FakeScaler(), fleet_of(1, 3)
    busy = fleet.get(WorkerId("decode-2"))
    assert busy is not None
    busy.blocks_placed = {"a": 1}  # type: ignore[dict-item]  # only their number matters
    assert resizing(scaler).resize(fleet, MODEL, Split(3, 3)) == []
    assert scaler.added == [Role.PREFILL, Role.PREFILL]
    assert resizing(scaler).resize(fleet, MODEL, Split(1, 1)) == []
    assert scaler.retired == ["decode-1", "decode-0"], "what runs on decode-2 need not move"


def test_a_role_that_has_too_many_gives_one_to_the_other() -> None:
    scaler, fleet = FakeScaler(), fleet_of(1, 3)
    events = resizing(scaler).resize(fleet, MODEL, Split(3, 2))
    assert events == [ChangeWorkerRole(worker=WorkerId("decode-2"), role=Role.PREFILL)]
    assert scaler.added == [Role.PREFILL]
    assert scaler.retired == []


def test_workers_that_are_drained_to_go_are_not_counted_and_those_that_change_count_in_their_new_role() -> (
    None
):
    fleet = fleet_of(2, 2)
    leaving, changing = fleet.get(WorkerId("decode-0")), fleet.get(WorkerId("decode-1"))
    assert leaving is not None
    assert changing is not None
    leaving.draining = True
    changing.draining, changing.role_asked = True, Role.PREFILL
    assert in_use(fleet, MODEL) == Split(3, 0)


@pytest.mark.parametrize(
    ("settings", "wanted", "why"),
    [
        ({"max_decode": 2}, Split(1, 3), "max_decode is 2"),
        ({"min_prefill": 2}, Split(1, 1), "min_prefill is 2"),
        ({"budget_workers": 3}, Split(2, 2), "budget_workers is 3"),
        ({"budget_devices": 7.0}, Split(2, 2), "8 devices, and planner.budget_devices leaves 7"),
        ({}, Split(1, 0), "min_decode is 1"),
    ],
)
def test_what_the_limits_forbid_is_refused_with_the_limit(
    settings: dict[str, object], wanted: Split, why: str
) -> None:
    scaler = FakeScaler(size=2.0)
    with pytest.raises(InvalidRequest, match=why):
        resizing(scaler, **settings).resize(fleet_of(1, 1), MODEL, wanted)
    assert not scaler.added


def test_a_fleet_above_its_limits_may_shrink_step_by_step() -> None:
    scaler = FakeScaler()
    resizing(scaler, budget_workers=2).resize(fleet_of(2, 3), MODEL, Split(2, 2))
    assert scaler.retired == ["decode-2"]
    with pytest.raises(InvalidRequest, match="budget_workers is 2"):
        resizing(scaler, budget_workers=2).resize(fleet_of(2, 3), MODEL, Split(3, 2))


def test_devices_that_other_models_take_or_await_are_not_to_be_had() -> None:
    scaler = FakeScaler(under_way=[starting(Role.DECODE)])
    both = Resizing(scaler, PlannerSettings(budget_devices=8), {MODEL: MODEL, "other": "other"})
    fleet = fleet_of(1, 2)
    assert both.limits(fleet, MODEL).budget_devices == 8
    assert both.limits(fleet, "other").budget_devices == 8 - 3 - 1


def test_nothing_is_begun_while_the_last_change_is_under_way() -> None:
    scaler = FakeScaler(under_way=[starting(Role.DECODE)])
    with pytest.raises(InvalidRequest, match="new-9 starting"):
        resizing(scaler).resize(fleet_of(1, 1), MODEL, Split(1, 2))


def test_growth_ends_where_something_limits_it_and_nowhere_else() -> None:
    now = Split(2, 3)
    assert Limits().may_grow(now) == now
    assert Limits(max_decode=9).may_grow(now) == Split(2, 9)
    assert Limits(budget_workers=10, min_decode=2).may_grow(now) == Split(8, 9)
    sized = Limits(budget_devices=16.0, prefill_devices=1.0, decode_devices=4.0)
    assert sized.may_grow(now) == Split(12, 3)


def active(scaler: FakeScaler) -> PlannerControl:
    settings = PlannerSettings(mode=PlannerMode.ACTIVE, interval_s=1.0, dwell_s=2.0, max_prefill=4)
    return PlannerControl(
        [MODEL],
        settings,
        CoordinatorSettings(local_prefill=LocalPrefill.NEVER),
        Metrics(),
        Resizing(scaler, settings, {MODEL: MODEL}),
    )


def test_an_active_planner_starts_workers_within_the_limits() -> None:
    scaler = FakeScaler()
    long_prompts(active(scaler), 9, fleet_of(1, 1))
    assert scaler.added
    assert set(scaler.added) == {Role.PREFILL}
    assert len(scaler.added) <= 3 * 3, "at most four prefill workers, asked for again after each dwell time"


def test_an_active_planner_waits_while_workers_come_and_longer_after_starts_that_failed() -> None:
    waiting = FakeScaler(under_way=[starting(Role.PREFILL)])
    long_prompts(active(waiting), 20, fleet_of(1, 1))
    assert waiting.added == []
    failing, fine = FakeScaler(failures=3), FakeScaler()
    for scaler in (failing, fine):
        long_prompts(active(scaler), 20, fleet_of(1, 1))
    assert 0 < len(failing.added) < len(fine.added) / 2


@scenario
async def test_operators_are_told_how_far_it_is_or_that_nobody_starts_workers(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        with pytest.raises(ConfigError, match="nobody starts workers"):
            await asyncio.to_thread(lambda: list(scale(system.address, decode=2)))


def test_an_empty_fleet_has_nothing_in_use() -> None:
    assert in_use(Fleet(), MODEL) == Split(0, 0)
