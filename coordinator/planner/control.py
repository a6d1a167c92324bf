"""The planners of a running coordinator: told what its dispatcher sees, asked once in an interval.

`advisory` says what it would do; `active` changes roles. Adding and removing workers is proposed only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Final

from coordinator.events import ChangeWorkerRole, Event, NewRequest
from coordinator.fleet import Fleet
from coordinator.metrics import Metrics
from coordinator.planner.planner import LOCAL_SHARE, Planner, PlannerRules
from coordinator.planner.proposal import Flip, Proposal, Standing
from coordinator.report import Report
from pdserve.core.config import CoordinatorSettings, LocalPrefill
from pdserve.core.errors import PdServeError
from pdserve.core.messages import FinishReason, Role
from pdserve.core.operation_settings import PlannerMode, PlannerSettings

log = logging.getLogger(__name__)


def rules_of(settings: PlannerSettings, coordinator: CoordinatorSettings) -> PlannerRules:
    never = coordinator.local_prefill is LocalPrefill.NEVER
    return PlannerRules(
        budget=settings.budget_workers,
        interval_s=settings.interval_s,
        dwell_s=settings.dwell_s,
        min_gain=settings.min_gain,
        season_s=settings.season_s,
        local_share=0.0 if never else LOCAL_SHARE,
        scales=settings.budget_workers is not None,
    )


class PlannerControl:
    """One planner per model."""

    def __init__(
        self,
        models: Sequence[str],
        settings: PlannerSettings,
        coordinator: CoordinatorSettings,
        metrics: Metrics,
    ) -> None:
        rules = rules_of(settings, coordinator)
        self.mode: Final = settings.mode
        self._planners = {model: Planner(model, rules) for model in models}
        self._interval_s, self._metrics = settings.interval_s, metrics
        self._next = -math.inf
        self._said: dict[str, str] = {}

    def proposals(self) -> list[Proposal]:
        """The newest of each model that has one."""
        return [planner.last for planner in self._planners.values() if planner.last is not None]

    # --- what the dispatcher tells ----------------------------------------------------------------------

    def arrived(self, samples: Sequence[NewRequest], now: float) -> None:
        planner = self._planners.get(samples[0].model)
        if planner is not None:
            for sample in samples:
                planner.tracker.arrived(len(sample.tokens), sample.ttft_target_s, sample.tpot_target_s, now)

    def ended(self, report: Report, outcome: FinishReason | PdServeError, now: float) -> None:
        planner = self._planners.get(report.model)
        if planner is not None and not isinstance(outcome, PdServeError):
            planner.tracker.answered(report.prompt_tokens, report.cached_tokens, report.output_tokens, now)

    def ticked(self, fleet: Fleet, now: float) -> list[Event]:
        """What is to be done now; nothing but once in an interval."""
        if now < self._next:
            return []
        self._next = now + self._interval_s
        events: list[Event] = []
        for planner in self._planners.values():
            events += self._plan(planner, fleet, now)
        return events

    def _plan(self, planner: Planner, fleet: Fleet, now: float) -> list[Event]:
        proposal = planner.plan(fleet, now)
        act = self.mode is PlannerMode.ACTIVE and isinstance(proposal.change, Flip)
        if proposal.standing is Standing.ACTED and not act:
            proposal = planner.only_proposed(proposal)
        self._tell(proposal)
        if proposal.standing is not Standing.ACTED or not isinstance(proposal.change, Flip):
            return []
        planner.changed(now)
        return [ChangeWorkerRole(worker=proposal.change.worker, role=proposal.change.to)]

    def _tell(self, proposal: Proposal) -> None:
        model, metrics = proposal.model, self._metrics
        metrics.planner_plans.labels(model, proposal.standing.value).inc()
        metrics.planner_rate.labels(model).set(proposal.rate)
        metrics.planner_capacity.labels(model, "now").set(proposal.capacity)
        metrics.planner_capacity.labels(model, "wanted").set(proposal.wanted_capacity)
        metrics.planner_wanted.labels(model, Role.PREFILL.value).set(proposal.wanted.prefill)
        metrics.planner_wanted.labels(model, Role.DECODE.value).set(proposal.wanted.decode)
        key = f"{proposal.standing.value} {proposal.wanted}"
        if self._said.get(model) != key and proposal.standing not in (Standing.KEEP, Standing.UNKNOWN):
            log.info("plan of %s", proposal)
        self._said[model] = key
