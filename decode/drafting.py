"""Guesses at the next tokens of a sequence, for one step to check several at once (speculative decoding).

A guess can only cost time: the target's own token at each position decides (see `speculation`). So a drafter
may be as rough as it likes, and keeps no state that another worker would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from decode.run import DecodeRun
from pdserve.core.ids import AttemptId

if TYPE_CHECKING:
    from decode.run import Turn


class Drafter(Protocol):
    """`limit` and `forget` belong to the scheduler, `fill` to the step: a drafter may compute there."""

    def limit(self, run: DecodeRun, wanted: int) -> int:
        """How many tokens it could guess now, at most `wanted`."""
        ...

    def fill(self, turns: Sequence[Turn]) -> None:
        """Put up to `turn.depth` guesses into `turn.drafts` of each turn."""
        ...

    def forget(self, attempt: AttemptId) -> None:
        """The sequence is not here any more."""
        ...


class PromptLookup:
    """Guesses that what followed the same few tokens earlier follows again (Saxena 2023, prompt lookup).

    Of the earlier places where the longest ending of the sequence stood, `min_tokens` to `max_tokens` long,
    it takes the latest. A guess that runs past the sequence's end goes on into itself, so that a loop is
    guessed to any depth.
    """

    def __init__(self, *, min_tokens: int, max_tokens: int) -> None:
        self._min, self._max = min_tokens, max_tokens
        self._of: dict[AttemptId, _Text] = {}
        self._guesses: dict[AttemptId, list[int]] = {}

    def limit(self, run: DecodeRun, wanted: int) -> int:
        text = self._of.get(run.attempt)
        if text is None:
            text = self._of[run.attempt] = _Text()
        text.extend(run.tokens)
        guess = text.continuation(self._min, self._max, wanted)
        self._guesses[run.attempt] = guess
        return len(guess)

    def fill(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            turn.drafts = self._guesses.get(turn.run.attempt, [])[: turn.depth]
        self._guesses.clear()

    def forget(self, attempt: AttemptId) -> None:
        self._of.pop(attempt, None)
        self._guesses.pop(attempt, None)


class _Text:
    """The tokens of one sequence as an array that grows."""

    def __init__(self) -> None:
        self._tokens: NDArray[np.int64] = np.empty(256, dtype=np.int64)
        self._size = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """`tokens` begin with what is here."""
        size = len(tokens)
        if size > len(self._tokens):
            grown = np.empty(2 * size, dtype=np.int64)
            grown[: self._size] = self._tokens[: self._size]
            self._tokens = grown
        self._tokens[self._size : size] = tokens[self._size :]
        self._size = size

    def continuation(self, shortest: int, longest: int, count: int) -> list[int]:
        text = self._tokens[: self._size]
        if self._size <= shortest:
            return []
        # Ends of earlier places that agree with the last token, then with the last two, and so on.
        ends: NDArray[np.intp] = np.flatnonzero(text[:-1] == text[-1])
        best: NDArray[np.intp] = ends[:0]
        for length in range(1, longest + 1):
            if length >= shortest and len(ends):
                best = ends
            ends = ends[ends >= length]
            if not len(ends) or length == self._size:
                break
            ends = ends[text[ends - length] == text[-1 - length]]
        if not len(best):
            return []
        start = int(best[-1]) + 1
        guess: list[int] = text[start : start + count].tolist()
        period = self._size - start
        while len(guess) < count:
            guess.append(guess[len(guess) - period])
        return guess
