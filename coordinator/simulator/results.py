"""What a simulated run was worth: goodput, attainment by class, worker-hours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.simulator.world import Ended, Run, Setup
from pdserve.core.errors import Overloaded, PdServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    name: str
    requests: int
    refused: int
    """At once, with a hint when to come back."""
    failed: int
    """In any other way."""
    good: int
    """Complete, and every target met."""
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float

    @property
    def attainment(self) -> float:
        """Of the requests that were not refused."""
        admitted = self.requests - self.refused
        return self.good / admitted if admitted else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    classes: tuple[ClassResult, ...]
    """The first is all of them together."""
    span_s: float
    worker_hours: float
    ttft_error: float | None
    """Median of |predicted - measured| / measured; None where nothing was measured."""
    decisions: str

    @property
    def all(self) -> ClassResult:
        return self.classes[0]

    @property
    def goodput(self) -> float:
        """Requests per second that were complete with every target met."""
        return self.all.good / self.span_s if self.span_s else 0.0


def good(ended: Ended) -> bool:
    """Complete, and every target met."""
    report = ended.report
    failed = isinstance(ended.outcome, PdServeError)
    return not failed and report.ttft_met is not False and report.tpot_met is not False


def summarise(run: Run, setup: Setup) -> Result:
    names = sorted({ended.arrival.sla.name for ended in run.ended})
    groups = [("all", run.ended)]
    if len(names) > 1:
        groups += [(name, [e for e in run.ended if e.arrival.sla.name == name]) for name in names]
    errors = [
        abs(r.predicted_ttft_s - r.ttft_s) / r.ttft_s
        for r in (ended.report for ended in run.ended)
        if r.predicted_ttft_s is not None and r.ttft_s
    ]
    return Result(
        classes=tuple(_class_result(name, ended) for name, ended in groups),
        span_s=run.span_s,
        worker_hours=(setup.prefill + setup.decode) * run.span_s / 3600,
        ttft_error=statistics.median(errors) if errors else None,
        decisions=run.decisions,
    )


def _class_result(name: str, ended: Sequence[Ended]) -> ClassResult:
    ttft = sorted(e.report.ttft_s for e in ended if e.report.ttft_s is not None)
    tpot = sorted(e.report.tpot_s for e in ended if e.report.tpot_s is not None)
    refused = sum(isinstance(e.outcome, Overloaded) for e in ended)
    failed = sum(isinstance(e.outcome, PdServeError) for e in ended) - refused
    return ClassResult(
        name=name,
        requests=len(ended),
        refused=refused,
        failed=failed,
        good=sum(map(good, ended)),
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p99_s=_quantile(ttft, 0.99),
        tpot_p50_s=_quantile(tpot, 0.5),
        tpot_p99_s=_quantile(tpot, 0.99),
    )


def _quantile(ascending: Sequence[float], q: float) -> float:
    """The nearest rank; 0 of nothing."""
    return ascending[min(int(q * len(ascending)), len(ascending) - 1)] if ascending else 0.0
