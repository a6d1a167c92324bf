"""How far predictions are trusted: learned from promises that were kept and broken."""

from __future__ import annotations

import random
from dataclasses import replace

from coordinator.promises import ALLOWED, LEAST, MOST_TPOT, MOST_TTFT, Margins
from coordinator.report import Report
from pdserve.core.ids import RequestId

REPORT = Report(
    id=RequestId("r"),
    model="m",
    tenant="",
    priority=0,
    prompt_tokens=10,
    output_tokens=10,
    attempts=1,
    e2e_s=1.0,
    queue_s=0.0,
    ttft_s=0.5,
    tpot_s=0.01,
    ttft_target_s=1.0,
    tpot_target_s=0.02,
)


def test_the_part_of_promises_that_are_broken_settles_where_it_is_allowed() -> None:
    """Predictions err by a factor that is 10% too low on average, and nobody says so."""
    rng, margins, broken = random.Random(0), Margins(), 0
    for index in range(20_000):
        promised_s = 1.0 / margins.ttft  # the longest prediction that is still admitted
        came_s = promised_s * rng.gauss(1.1, 0.05)
        broken += came_s > 1.0 and index >= 10_000
        margins.kept(replace(REPORT, ttft_s=came_s))
    assert 0.5 * ALLOWED < broken / 10_000 < 1.5 * ALLOWED
    assert 1.15 < margins.ttft < 1.35


def test_each_kind_of_promise_has_its_own_margin_within_bounds() -> None:
    margins = Margins()
    for _ in range(200):
        margins.kept(replace(REPORT, tpot_s=0.03))
    assert margins.tpot == MOST_TPOT
    assert LEAST <= margins.ttft < 1.0
    for _ in range(200):
        margins.kept(replace(REPORT, ttft_s=2.0))
    assert margins.ttft == MOST_TTFT


def test_requests_without_targets_promise_nothing() -> None:
    margins = Margins()
    margins.kept(replace(REPORT, ttft_target_s=None, tpot_target_s=None))
    assert margins == Margins()
