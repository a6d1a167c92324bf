"""A missed target is blamed on what took longest."""

from __future__ import annotations

import pytest

from coordinator.breakdown import after_first_token, before_first_token, longest
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import Role
from tests.support.registry_world import World, new_request

Q, A, P, T, D, M = (
    Phase.QUEUED,
    Phase.ADMITTED,
    Phase.PREFILLING,
    Phase.TRANSFERRING,
    Phase.DECODING,
    Phase.MIGRATING,
)


def test_time_before_the_first_token_adds_up() -> None:
    history = [(1.0, Q), (3.0, A), (3.5, P), (7.5, T), (8.0, D)]
    parts = before_first_token(history, 7.5, prefill_queue_s=1.0)
    assert parts == {"queue": 2.5, "prefill_queue": 1.0, "prefill": 3.0, "retry": 0.0}


def test_what_an_attempt_took_that_came_to_nothing_is_retry() -> None:
    history = [(0.0, Q), (0.1, P), (5.0, Q), (5.2, A), (5.3, P), (6.0, T)]
    parts = before_first_token(history, 6.0, prefill_queue_s=0.0)
    assert longest(parts) == "retry"
    assert sum(parts.values()) == pytest.approx(6.0)


def test_time_between_tokens_is_split_by_what_interrupted_them() -> None:
    history = [(0.0, Q), (0.5, P), (1.0, T), (1.5, D), (4.0, M), (4.5, D), (6.0, Q), (7.0, P), (8.0, D)]
    parts = after_first_token(history, 1.0, 9.0)
    assert parts == {"transfer": 0.5, "decode": 5.0, "moving": 0.5, "retry": 2.0}


def test_a_report_says_how_late_and_why() -> None:
    world = World()
    late = new_request("late", max_tokens=3, ttft_target_s=1.0, tpot_target_s=1e9)
    world.submit(late)
    world.tick(5.0)  # there is no worker yet
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    world.run()
    report = world.ends[late.id].report
    assert (report.ttft_met, report.ttft_late_s, report.ttft_missed_in) == (False, 4.0, "queue")
    assert (report.tpot_met, report.tpot_missed_in) == (True, "")
