"""What a simulated run was worth: goodput, attainment by class, worker-hours."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.simulator.world import Ended, Run
from pdserve.core.errors import Overloaded, PdServeError

_FINISHED, _REFUSED, _FAILED = 0, 1, 2
_NONE: Final = float("nan")


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
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p90_s: float
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
    """Of the arrivals: how long it takes to serve them shows in their latencies."""
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


@dataclass(slots=True)
class Tally:
    """A few numbers of every request that ended, in columns: a million of them take 40 MB."""

    names: list[str] = field(default_factory=list)
    """Of classes; the column `_class` holds indices of these."""
    _class: array[int] = field(default_factory=lambda: array("H"))
    _outcome: array[int] = field(default_factory=lambda: array("B"))
    _good: array[int] = field(default_factory=lambda: array("B"))
    _ttft: array[float] = field(default_factory=lambda: array("d"))
    _tpot: array[float] = field(default_factory=lambda: array("f"))
    _predicted: array[float] = field(default_factory=lambda: array("d"))

    def add(self, ended: Ended) -> None:
        name, report, outcome = ended.arrival.sla.name, ended.report, ended.outcome
        if name not in self.names:
            self.names.append(name)
        self._class.append(self.names.index(name))
        refused = isinstance(outcome, Overloaded)
        failed = isinstance(outcome, PdServeError)
        self._outcome.append(_REFUSED if refused else _FAILED if failed else _FINISHED)
        self._good.append(good(ended))
        self._ttft.append(_NONE if report.ttft_s is None else report.ttft_s)
        self._tpot.append(_NONE if report.tpot_s is None else report.tpot_s)
        self._predicted.append(_NONE if report.predicted_ttft_s is None else report.predicted_ttft_s)

    def classes(self) -> tuple[ClassResult, ...]:
        """All requests together, then each class where there are several."""
        of = np.frombuffer(self._class, np.uint16)
        groups = [("all", np.ones(len(of), bool))]
        if len(self.names) > 1:
            groups += [(name, of == self.names.index(name)) for name in sorted(self.names)]
        return tuple(self._class_result(name, chosen) for name, chosen in groups)

    def ttft_error(self) -> float | None:
        measured, predicted = np.frombuffer(self._ttft), np.frombuffer(self._predicted)
        known = (measured > 0) & ~np.isnan(predicted)
        if not known.any():
            return None
        return float(np.median(np.abs(predicted[known] / measured[known] - 1)))

    def _class_result(self, name: str, chosen: NDArray[np.bool_]) -> ClassResult:
        outcome = np.frombuffer(self._outcome, np.uint8)[chosen]
        ttft = _quantiles(np.frombuffer(self._ttft)[chosen])
        tpot = _quantiles(np.frombuffer(self._tpot, np.float32)[chosen])
        return ClassResult(
            name=name,
            requests=len(outcome),
            refused=int((outcome == _REFUSED).sum()),
            failed=int((outcome == _FAILED).sum()),
            good=int(np.frombuffer(self._good, np.uint8)[chosen].sum()),
            ttft_p50_s=ttft[0],
            ttft_p90_s=ttft[1],
            ttft_p99_s=ttft[2],
            tpot_p50_s=tpot[0],
            tpot_p90_s=tpot[1],
            tpot_p99_s=tpot[2],
        )


def summarise(run: Run, tally: Tally) -> Result:
    return Result(
        classes=tally.classes(),
        span_s=run.span_s,
        worker_hours=run.worker_hours,
        ttft_error=tally.ttft_error(),
        decisions=run.decisions,
    )


def _quantiles(values: NDArray[np.floating]) -> Sequence[float]:
    """p50, p90 and p99 by the nearest rank; 0 of nothing."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return (0.0, 0.0, 0.0)
    return [float(known[min(int(q * len(known)), len(known) - 1)]) for q in (0.5, 0.9, 0.99)]
