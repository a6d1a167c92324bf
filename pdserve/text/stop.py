"""Find stop strings in a stream of text, wherever its pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    text_to_emit: str
    matched: str | None
    """The stop string that ended the text; it is not part of `text_to_emit`."""


class StopMatcher:
    """The match that is complete first ends the text, the longest of those complete at the same character.

    Only the longest end of the text that may still become a stop string is held back. How the text is cut
    into pieces changes nothing. Work per character is constant for each stop string (Knuth, Morris and Pratt,
    1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: none of them empty."""
        self._automata = [_Prefixes(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> StopResult:
        """What may be shown now. After a match, nothing more is."""
        if self._matched is not None:
            return StopResult("", self._matched)
        if not self._automata:
            return StopResult(text, None)
        for index, character in enumerate(text):
            complete = None
            for automaton in self._automata:
                if automaton.advance(character) and complete is None:
                    complete = automaton.pattern
            if complete is not None:
                self._matched = complete
                seen = self._held + text[: index + 1]
                self._held = ""
                return StopResult(seen[: len(seen) - len(complete)], complete)
        seen = self._held + text
        border = len(seen) - max(automaton.matched for automaton in self._automata)
        self._held = seen[border:]
        return StopResult(seen[:border], None)

    def flush(self) -> str:
        """The text is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held


class _Prefixes:
    """How much of `pattern` the text read so far ends with."""

    def __init__(self, pattern: str) -> None:
        if not pattern:
            raise ValueError("a stop string must not be empty")
        self.pattern = pattern
        self.matched = 0
        self._fallback = [0] * len(pattern)  # [i]: longest border of pattern[: i + 1]
        length = 0
        for index in range(1, len(pattern)):
            while length and pattern[index] != pattern[length]:
                length = self._fallback[length - 1]
            length += pattern[index] == pattern[length]
            self._fallback[index] = length

    def advance(self, character: str) -> bool:
        """Read one character; True when the pattern is complete."""
        if self.matched == len(self.pattern):
            self.matched = self._fallback[-1]
        while self.matched and character != self.pattern[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += character == self.pattern[self.matched]
        return self.matched == len(self.pattern)
