"""The phases of a request and nothing but their legal transitions."""

from __future__ import annotations

import itertools

import pytest

from pdserve.core.errors import IllegalTransition
from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.lifecycle import NEXT, TERMINAL, Phase, RequestRecord


def _record() -> RequestRecord:
    return RequestRecord(id=RequestId("r1"), created=10.0)


def test_every_phase_has_a_row_in_the_table() -> None:
    assert set(NEXT) == set(Phase)


def test_the_terminal_phases_are_the_four_ends() -> None:
    assert frozenset({Phase.FINISHED, Phase.FAILED, Phase.CANCELLED, Phase.REJECTED}) == TERMINAL


def test_a_request_can_be_cancelled_and_failed_from_every_live_phase() -> None:
    for phase in set(Phase) - TERMINAL:
        assert {Phase.CANCELLED, Phase.FAILED} <= NEXT[phase], phase


def test_every_phase_is_reachable_from_queued() -> None:
    seen, frontier = {Phase.QUEUED}, [Phase.QUEUED]
    while frontier:
        for after in NEXT[frontier.pop()] - seen:
            seen.add(after)
            frontier.append(after)
    assert seen == set(Phase)


def test_a_whole_life_is_recorded_with_its_times() -> None:
    record = _record()
    path = [Phase.ADMITTED, Phase.PREFILLING, Phase.TRANSFERRING, Phase.DECODING, Phase.FINISHED]
    for at, phase in enumerate(path, start=11):
        record.move_to(phase, now=float(at))
    assert record.done
    assert [phase for _, phase in record.history] == [Phase.QUEUED, *path]
    assert record.seconds_in(Phase.QUEUED, now=99.0) == 1.0


def test_time_in_a_phase_adds_up_over_attempts() -> None:
    record = _record()
    record.move_to(Phase.ADMITTED, now=12.0)
    record.move_to(Phase.QUEUED, now=15.0)
    assert record.seconds_in(Phase.QUEUED, now=20.0) == 2.0 + 5.0


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_a_transition_outside_the_table_is_refused_and_changes_nothing(before: Phase, after: Phase) -> None:
    record = RequestRecord(id=RequestId("r1"), created=0.0, phase=before)
    if after in NEXT[before]:
        record.move_to(after, now=1.0)
        assert record.phase is after
        return
    with pytest.raises(IllegalTransition, match=f"{before} -> {after}"):
        record.move_to(after, now=1.0)
    assert record.phase is before
    assert len(record.history) == 1


def test_attempts_of_one_request_are_ordered() -> None:
    first = AttemptId(RequestId("r1"), 0)
    assert first < first.next()
    assert str(first.next()) == "r1#1"
