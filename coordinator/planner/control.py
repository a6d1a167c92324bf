"""The planners of a running coordinator: told what its dispatcher sees, asked once in an interval.

`advisory` says what it would do; `active` does it: roles change, and workers are added and retired by whoever
starts them (`coordinator.planner.resizing`). While workers come and go nothing else is changed.
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
from coordinator.planner.proposal import Flip, Proposal, Scale, Split, Standing
from coordinator.planner.resizing import Resizing
from coordinator.report import Report
from pdserve.core.config import CoordinatorSettings, LocalPrefill
from pdserve.core.errors import InvalidRequest, PdServeError
from pdserve.core.messages import FinishReason, Role
from pdserve.core.operation_settings import PlannerMode, PlannerSettings

log = logging.getLogger(__name__)

_MOST_DOUBLINGS: Final = 6


def rules_of(settings: PlannerSettings, coordinator: CoordinatorSettings) -> PlannerRules:
    never = coordinator.local_prefill is LocalPrefill.NEVER
    return PlannerRules(
        budget=settings.budget_workers,
        interval_s=settings.interval_s,
        dwell_s=settings.dwell_s,
        min_gain=settings.min_gain,
        season_s=settings.season_s,
        local_share=0.0 if never else LOCAL_SHARE,
        scales=any(
            limit is not None
            for limit in (
                settings.budget_workers,
                settings.budget_devices,
                settings.max_prefill,
                settings.max_decode,
            )
        ),
    )


class PlannerControl:
    """One planner per model."""

    def __init__(
        self,
        models: Sequence[str],
        settings: PlannerSettings,
        coordinator: CoordinatorSettings,
        metrics: Metrics,
        resizing: Resizing | None = None,
    ) -> None:
        """resizing: how workers are added and retired; None: that is proposed only."""
        rules = rules_of(settings, coordinator)
        self.mode: Final = settings.mode
        self._planners = {model: Planner(model, rules) for model in models}
        self._interval_s, self._metrics = settings.interval_s, metrics
        self._next = -math.inf
        self._said: dict[str, str] = {}
        self._resizing = resizing
        self._rest_until: dict[str, float] = {}
        """When adding may be tried again, of models for which it failed."""
        self._dwell_s = settings.dwell_s

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
        resizing, model = self._resizing, planner.model
        limits = None if resizing is None else resizing.limits(fleet, model)
        if resizing is not None and resizing.busy(model):
            planner.changed(now)
        proposal = planner.plan(fleet, now, limits)
        events: list[Event] = []
        if proposal.standing is Standing.ACTED:
            if self.mode is PlannerMode.ACTIVE and self._may(proposal, now):
                events = self._act(proposal, fleet, now)
                planner.changed(now)
            else:
                proposal = planner.only_proposed(proposal)
        self._tell(proposal)
        return events

    def _may(self, proposal: Proposal, now: float) -> bool:
        if isinstance(proposal.change, Flip):
            return True
        return self._resizing is not None and now >= self._rest_until.get(proposal.model, now)

    def _act(self, proposal: Proposal, fleet: Fleet, now: float) -> list[Event]:
        match proposal.change:
            case Flip(worker=worker, to=role):
                return [ChangeWorkerRole(worker=worker, role=role)]
            case Scale(role=role, by=by) if self._resizing is not None:
                # The next start waits longer the more of them failed.
                failed = self._resizing.num_failed(proposal.model)
                self._rest_until[proposal.model] = now + self._dwell_s * 2 ** min(failed, _MOST_DOUBLINGS)
                split = proposal.now
                more = (by, 0) if role is Role.PREFILL else (0, by)
                wanted = Split(split.prefill + more[0], split.decode + more[1])
                try:
                    return self._resizing.resize(fleet, proposal.model, wanted)
                except InvalidRequest as error:  # the fleet has changed meanwhile
                    log.warning("%s: not done: %s", proposal.model, error)
                    return []
            case _:
                return []

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
