"""From demand and speeds to a proposal, with hysteresis: a fleet is left alone unless a change clearly pays.

What a fleet is worth is the part of the forecast demand that it serves in time, averaged over what is not
known: the rate may come out higher or lower, and workers slower or faster than learned. That makes spare
capacity worth something by itself, and the same cases, one by one, say how sure a gain is. A change is
proposed when its gain is above `min_gain` by as much as it is uncertain, and made when that has held for
`confirmations` plans in a row and the last change was `dwell_s` ago.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.fleet import Fleet
from coordinator.planner.capacity import Capacities, Speeds, largest_batch, learned
from coordinator.planner.demand import Demand, DemandTracker
from coordinator.planner.limits import Limits
from coordinator.planner.proposal import Change, Flip, Proposal, Scale, Split, Standing
from coordinator.planner.resizing import idlest, workers_in
from pdserve.core.messages import Role

LEAST_ERROR: Final = 0.05
"""Relative error of a latency model that is assumed however well it did of late."""
LOCAL_SHARE: Final = 0.8
"""Of a decode worker's spare time; a pass over the weights is shared with the answers it writes."""
_SPARE: Final = 1.25
"""A fleet may shrink to one that serves this many times the demand."""
_REACH: Final = 8
"""Workers of a role that one plan adds or takes away at most; in a large fleet half of them, or twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerRules:
    budget: int | None = None
    """Workers at most; None: as many as there are."""
    interval_s: float = 10.0
    dwell_s: float = 60.0
    """Between two changes: what the last one brought is to be seen first."""
    min_gain: float = 0.02
    confirmations: int = 2
    season_s: float = 0.0
    local_share: float = LOCAL_SHARE
    """See `fleet_capacity`."""
    flips: bool = True
    """Whether workers can change their role."""
    scales: bool = False
    """Whether workers can be added and removed."""


@dataclass(slots=True)
class Planner:
    """Of one model. Told of every request, asked once in an interval."""

    model: str
    rules: PlannerRules
    tracker: DemandTracker = field(init=False)
    last: Proposal | None = None
    _changed_at: float | None = None
    _held: int = 0
    _held_for: Split | None = None
    _limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.tracker = DemandTracker(self.rules.interval_s, self.rules.season_s)

    def plan(self, fleet: Fleet, now: float, limits: Limits | None = None) -> Proposal:
        """What is worth changing, as of now. The change is due when its standing says `ACTED`.

        limits: of the numbers of workers; None: the rules' budget alone.
        """
        self.tracker.advance(now)
        self._limits = limits or Limits(budget_workers=self.rules.budget)
        readers, writers = (workers_in(fleet, self.model, role) for role in (Role.PREFILL, Role.DECODE))
        split = Split(len(readers), len(writers))
        speeds = learned([*readers, *writers]) if split.total else None
        demand = self.tracker.demand(self.rules.interval_s)
        if speeds is None or demand is None or not split.decode:
            proposal = _unknown(self.model, split, "too few requests were seen to know demand and speeds")
        elif not split.prefill:
            proposal = _unknown(self.model, split, "decode workers read prompts themselves here")
        else:
            proposal = self._judge(demand, speeds, split, fleet)
        self.last = self._settle(proposal, now)
        return self.last

    def changed(self, now: float) -> None:
        """A change was made, by the planner or anybody else."""
        self._changed_at, self._held, self._held_for = now, 0, None

    def only_proposed(self, proposal: Proposal) -> Proposal:
        """It is due, and nobody acts."""
        self.last = replace(proposal, standing=Standing.PROPOSED)
        return self.last

    # --- what is best -----------------------------------------------------------------------------------

    def _splits(self, now: Split) -> list[Split]:
        """Those to compare: a few dozen numbers of each role, in large fleets not every one."""
        rules, limits = self.rules, self._limits
        if not rules.scales:
            if not rules.flips:
                return [now]
            near = _around(now.prefill, limits.min_prefill, now.total - limits.min_decode)
            return [Split(prefill, now.total - prefill) for prefill in near] or [now]
        most = limits.may_grow(now)
        found = [
            Split(prefill, decode)
            for prefill in _around(now.prefill, limits.min_prefill, max(most.prefill, now.prefill))
            for decode in _around(now.decode, limits.min_decode, max(most.decode, now.decode))
        ]
        # A role takes up what the other gives, in whatever steps the grid has.
        found += [
            Split(prefill, now.total - prefill)
            for prefill in _around(now.prefill, limits.min_prefill, now.total - limits.min_decode)
        ]
        return [split for split in dict.fromkeys(found) if self._may(now, split)] or [now]

    def _may(self, now: Split, split: Split) -> bool:
        opposed = (split.prefill - now.prefill) * (split.decode - now.decode) < 0
        if opposed and not self.rules.flips:
            return False
        return self._limits.refusal(split) is None

    def _judge(
        self,
        demand: Demand,
        speeds: Speeds,
        now: Split,
        fleet: Fleet,
    ) -> Proposal:
        likely, *others = [
            (one, Capacities(fast, one, self.rules.local_share)) for one, fast in _cases(demand, speeds)
        ]
        cases = [likely, *others]
        capacity = likely[1]
        worth = {split: _served(split, cases) for split in self._splits(now)}
        worth.setdefault(now, _served(now, cases))
        best = self._best(worth, demand.rate, capacity, now)
        gains = [one - other for one, other in zip(worth[best], worth[now], strict=True)]
        gain = statistics.fmean(gains)
        uncertainty = statistics.pstdev(gains)
        wanted_capacity = capacity.of(best)
        impossible = _impossible(speeds, demand)
        proposal = Proposal(
            model=self.model,
            standing=Standing.KEEP,
            now=now,
            wanted=best,
            change=None,
            gain=gain,
            uncertainty=uncertainty,
            rate=demand.rate,
            capacity=capacity.of(now),
            wanted_capacity=wanted_capacity,
            reason=_why(demand, capacity, now, best),
        )
        if impossible is not None:
            return replace(proposal, standing=Standing.INFEASIBLE, wanted=now, reason=impossible)
        shrinks = best.total < now.total
        if best != now and (shrinks or gain - uncertainty >= self.rules.min_gain):
            change = self._first_step(now, best, fleet)
            return replace(proposal, standing=Standing.PROPOSED, change=change)
        if wanted_capacity < demand.rate:
            short = f"even {best} serve {wanted_capacity:.2f} of {demand.rate:.2f} requests/s in time"
            return replace(proposal, standing=Standing.INFEASIBLE, reason=short)
        return proposal

    def _first_step(self, now: Split, wanted: Split, fleet: Fleet) -> Change:
        """A flip where one role gives what the other wants; else workers are added, or one is retired."""
        more, less = wanted.prefill - now.prefill, wanted.decode - now.decode
        if more * less < 0:
            gives, takes = (Role.DECODE, Role.PREFILL) if more > 0 else (Role.PREFILL, Role.DECODE)
            return Flip(worker=idlest(fleet, self.model, gives)[0].id, to=takes)
        role, by = (Role.PREFILL, more) if abs(more) >= abs(less) else (Role.DECODE, less)
        return Scale(role=role, by=max(by, -1))

    def _best(self, worth: dict[Split, list[float]], rate: float, capacity: Capacities, now: Split) -> Split:
        """What serves most; of those that serve about as much, the smallest, then what changes least."""
        means = {split: statistics.fmean(values) for split, values in worth.items()}
        top = max(means.values())
        enough = [s for s, mean in means.items() if mean >= top - self.rules.min_gain / 2]

        def spare(split: Split) -> bool:
            if split.total >= now.total:
                return True
            return capacity.of(split) >= _SPARE * rate

        enough = [s for s in enough if spare(s)] or [max(means, key=means.__getitem__)]
        return min(enough, key=lambda s: (s.total, -means[s], abs(s.prefill - now.prefill)))

    # --- whether to do it -------------------------------------------------------------------------------

    def _settle(self, proposal: Proposal, now: float) -> Proposal:
        if proposal.standing is not Standing.PROPOSED:
            self._held, self._held_for = 0, None
            return proposal
        # It may grow while it is confirmed, but not turn round.
        same = self._held_for is not None and _direction(proposal.now, self._held_for) == _direction(
            proposal.now, proposal.wanted
        )
        self._held = self._held + 1 if same else 1
        self._held_for = proposal.wanted
        rested = self._changed_at is None or now - self._changed_at >= self.rules.dwell_s
        if self._held < self.rules.confirmations or not rested or proposal.change is None:
            return proposal
        return replace(proposal, standing=Standing.ACTED)


def _served(split: Split, cases: Sequence[tuple[Demand, Capacities]]) -> list[float]:
    """Part of the demand that comes in time, in each case."""
    return [
        min(1.0, capacity.of(split) / demand.rate) if demand.rate > 0 else 1.0 for demand, capacity in cases
    ]


def _why(demand: Demand, capacity: Capacities, now: Split, best: Split) -> str:
    read, written = capacity.read(now.prefill), capacity.written(now.decode)
    text = (
        f"{demand.rate:.2f} ± {demand.rate_std:.2f} requests/s are predicted, of {demand.context:.0f} + "
        f"{demand.answer:.0f} tokens; {now} read {read:.2f}/s and write {written:.2f}/s in time, "
        f"together {capacity.of(now):.2f}/s"
    )
    return text if best == now else f"{text}; {best} would serve {capacity.of(best):.2f}/s"


def _direction(now: Split, wanted: Split) -> tuple[int, int]:
    def sign(value: int) -> int:
        return (value > 0) - (value < 0)

    return sign(wanted.prefill - now.prefill), sign(wanted.decode - now.decode)


def _cases(demand: Demand, speeds: Speeds) -> list[tuple[Demand, Speeds]]:
    """As predicted, and with every combination of errors of one standard deviation."""
    read = max(speeds.prefill_error, LEAST_ERROR)
    written = max(speeds.decode_error, LEAST_ERROR)
    cases = [(demand, speeds)]
    for more, slow, late in itertools.product((-1, 1), repeat=3):
        rate = max(demand.rate + more * demand.rate_std, 0.0)
        cases.append((replace(demand, rate=rate), speeds.scaled(1 + slow * read, 1 + late * written)))
    return cases


def _around(now: int, least: int, most: int) -> list[int]:
    """Numbers in [least, most] to try: all near `now`, in a fleet of hundreds in steps."""
    low, high = max(least, now - max(_REACH, now // 2)), min(most, now + max(_REACH, now))
    step = max(1, (high - low) // (2 * _REACH))
    return sorted({n for n in (*range(low, high + 1, step), now, high) if least <= n <= most})


def _impossible(speeds: Speeds, demand: Demand) -> str | None:
    """Why no number of workers would do."""
    first, second, third = speeds.prefill
    alone_s = first + second * demand.prompt + third * demand.prompt_square / 2
    if alone_s >= demand.ttft_s:
        return (
            f"a mean prompt of {demand.prompt:.0f} tokens takes {alone_s * 1e3:.0f} ms alone, "
            f"and the TTFT target is {demand.ttft_s * 1e3:.0f} ms"
        )
    if largest_batch(speeds, demand) < 1:
        fixed, seq, context = speeds.decode
        step_s = fixed + seq + context * demand.context
        return (
            f"a step takes {step_s * 1e3:.1f} ms with one answer in it, "
            f"and the TPOT target is {demand.tpot_s * 1e3:.1f} ms"
        )
    return None


def _unknown(model: str, now: Split, reason: str) -> Proposal:
    return Proposal(
        model=model,
        standing=Standing.UNKNOWN,
        now=now,
        wanted=now,
        change=None,
        gain=0.0,
        uncertainty=0.0,
        rate=0.0,
        capacity=0.0,
        wanted_capacity=0.0,
        reason=reason,
    )
