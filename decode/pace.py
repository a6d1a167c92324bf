"""How much of prompts a step may hold beside answers, so that running streams keep to their targets. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from decode.run import DecodeRun

_WEIGHT: Final = 0.2
"""Of the newest step in the moving averages."""


class Pace:
    """Learns what answers and prompt tokens take of a step."""

    def __init__(self, *, budget: int, block_tokens: int) -> None:
        """budget: tokens of a step, where no stream has a target."""
        self._budget, self._block_tokens = budget, block_tokens
        self._answers_s: float | None = None
        """Of a step that only writes."""
        self._token_s: float | None = None
        """Of one more prompt token."""

    def prompt_tokens(self, answers: Sequence[DecodeRun]) -> int:
        """At least a block, or no prompt would ever be read beside many answers."""
        left = self._budget - len(answers)
        targets = [t for run in answers if (t := run.spec.tpot_target_s) is not None]
        if targets and self._answers_s is not None and self._token_s:
            left = min(left, int((min(targets) - self._answers_s) / self._token_s))
        return max(left, self._block_tokens)

    def stepped(self, *, num_answers: int, prompt_tokens: int, seconds: float) -> None:
        if not prompt_tokens:
            self._answers_s = _moved(self._answers_s, seconds)
            return
        if num_answers and self._answers_s is None:
            return  # whose time it was cannot be told
        own = seconds - (self._answers_s or 0.0) if num_answers else seconds
        self._token_s = _moved(self._token_s, max(own, 0.0) / prompt_tokens)


def _moved(average: float | None, value: float) -> float:
    return value if average is None else average + _WEIGHT * (value - average)
