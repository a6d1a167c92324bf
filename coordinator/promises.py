"""How far predictions are trusted where a target was promised: learned from the promises that were broken.

A margin multiplies each prediction before it is held against a target. Every answer that misses raises it,
and every one that keeps lowers it a little, in the ratio at which `ALLOWED` of them miss: whatever the errors
of the models are, and however they change, the part that misses settles there. (I. Gibbs and E. Candès,
"Adaptive Conformal Inference Under Distribution Shift", 2021, with a margin in place of a quantile.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator.report import Report

ALLOWED: Final = 0.004
"""Of the promises of each kind, that are broken: two kinds leave 99% of the requests with both kept."""
_STEP: Final = 0.02
"""By which a broken promise raises the margin."""
LEAST: Final = 0.97
MOST_TTFT: Final = 1.5
MOST_TPOT: Final = 1.04
"""Bounds, since not every miss is the fault of a prediction: a pause spoils an answer of three tokens
whatever the batch is, and a smaller one would only cost goodput."""


@dataclass(slots=True)
class Margins:
    """Of one model."""

    ttft: float = 1.0
    tpot: float = 1.0

    def kept(self, report: Report) -> None:
        """An answer that was admitted has ended, whole: were its targets met?"""
        if report.ttft_met is not None:
            self.ttft = _moved(self.ttft, broken=not report.ttft_met, most=MOST_TTFT)
        if report.tpot_met is not None:
            self.tpot = _moved(self.tpot, broken=not report.tpot_met, most=MOST_TPOT)


def _moved(margin: float, *, broken: bool, most: float) -> float:
    margin += _STEP * (1 - ALLOWED) if broken else -_STEP * ALLOWED
    return min(max(margin, LEAST), most)
