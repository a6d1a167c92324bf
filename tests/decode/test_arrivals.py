from __future__ import annotations

import itertools

import pytest

from decode.arrivals import Arrivals
from pdserve.core.handover import HANDOVER_VERSION, Handover, PushNote
from pdserve.core.ids import AttemptId, RequestId

ATTEMPT = AttemptId(RequestId("r"), 2)


def handover(**fields: object) -> Handover:
    values: dict[str, object] = {
        "version": HANDOVER_VERSION,
        "attempt": ATTEMPT,
        "num_tokens": 10,
        "num_pushes": 3,
        "bytes_moved": 0,
        "first_token": 5,
        "logprobs": None,
    }
    return Handover(**{**values, **fields})  # type: ignore[arg-type]


def note(sequence: int, given: Handover | None = None) -> PushNote:
    return PushNote(attempt=ATTEMPT, sequence=sequence, handover=given)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_it_is_whole_when_every_push_has_come_in_any_order(order: tuple[int, ...]) -> None:
    arrivals = Arrivals()
    notes = [note(0), note(1), note(2, handover())]
    for index in order:
        assert not arrivals.complete
        assert arrivals.add(notes[index])
        assert arrivals.error(ATTEMPT, 10) is None
    assert arrivals.complete


def test_a_note_said_twice_counts_once() -> None:
    arrivals = Arrivals()
    assert arrivals.add(note(2, handover()))
    assert not arrivals.add(note(2, handover()))
    arrivals.add(note(0))
    assert not arrivals.add(note(0))
    assert not arrivals.complete


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (handover(version=HANDOVER_VERSION + 1), "version"),
        (handover(num_tokens=9), "KV of 10 tokens"),
        (handover(attempt=ATTEMPT.next()), "hand-over of r#2"),
        (handover(num_pushes=2), "2 pushes"),
    ],
)
def test_a_hand_over_that_does_not_fit_is_an_error_that_says_how(given: Handover, named: str) -> None:
    arrivals = Arrivals()
    arrivals.add(note(2, given))
    error = arrivals.error(ATTEMPT, 10)
    assert error is not None
    assert named in str(error)
    assert error.retryable
