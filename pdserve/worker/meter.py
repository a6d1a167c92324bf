"""How long steps take and how many tokens they make: what the coordinator's latency model starts from."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 0.2
"""Of the newest step in the moving average."""


class StepMeter:
    """Moving averages over steps; idle time between them does not count."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_s = 0.0
        self.tokens_per_s = 0.0
        self.tokens = 0
        """All there were."""
        self.busy_s = 0.0

    def count(self, *, seconds: float, tokens: int) -> None:
        rate = tokens / seconds if seconds > 0 else 0.0
        weight = 1.0 if self.steps == 0 else _WEIGHT
        self.step_s += weight * (seconds - self.step_s)
        self.tokens_per_s += weight * (rate - self.tokens_per_s)
        self.steps += 1
        self.tokens += tokens
        self.busy_s += seconds
