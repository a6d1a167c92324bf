"""Stop strings: found across pieces, cut out, and nothing held back that need not be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pdserve.text.stop import StopMatcher

TEXTS = st.text(alphabet="ab\n", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown, matched = "", None
    for piece in pieces:
        result = matcher.push(piece)
        shown, matched = shown + result.text_to_emit, result.matched
    return shown + matcher.flush(), matched


def first_complete(stops: list[str], text: str) -> tuple[str, str | None]:
    """The definition: the first character at which some stop string is complete, the longest of those."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(STOPS, TEXTS, st.lists(st.integers(0, 24), max_size=8))
@example(["aab"], "aaab", [1, 2, 3])
@example(["abab", "ba"], "aabab", [2, 4])
def test_the_result_is_the_definitions_however_the_text_is_cut(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert run(stops, pieces) == first_complete(stops, text)


@given(STOPS, TEXTS)
def test_only_the_longest_possible_beginning_of_a_stop_string_is_held_back(
    stops: list[str], text: str
) -> None:
    matcher = StopMatcher(stops)
    result = matcher.push(text)
    if result.matched is None:
        starts = [n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stops)]
        held = max(starts, default=0)
        assert result.text_to_emit == text[: len(text) - held]
        assert matcher.flush() == text[len(text) - held :]


def test_a_stop_string_over_three_pieces_never_shows_its_beginning() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    emitted = [matcher.push(piece).text_to_emit for piece in ("Hi\n", "\nUs", "er: ho")]
    assert emitted == ["Hi", "", ""]
    assert matcher.push("more").text_to_emit == ""
    assert matcher.push("").matched == "\n\nUser:"
    assert matcher.flush() == ""


def test_text_that_only_resembled_a_stop_string_comes_out() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN").text_to_emit == "the "
    assert matcher.push("ERGY").text_to_emit == "ENERGY"


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert run([], ["a", "", "b"]) == ("ab", None)


def test_an_empty_stop_string_is_our_callers_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
