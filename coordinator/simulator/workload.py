"""What arrives in a simulation: requests of classes, from a trace or from a generator, scaled to a rate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from pdserve.bench.arrivals import Arrivals
from pdserve.bench.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from pdserve.core.errors import ConfigError

PREFIX_BLOCK_TOKENS: Final = MOONCAKE_BLOCK_TOKENS
"""Prompts begin alike in whole blocks of this many tokens."""
_OWN: Final = 1 << 30
"""Token ids from here on belong to one prompt alone; below, they are the trace's ids of blocks."""


def is_shared(token: int) -> bool:
    """Of a modelled prompt: other prompts may begin with the block that it belongs to."""
    return token < _OWN


@dataclass(frozen=True, slots=True, kw_only=True)
class SlaClass:
    """Requests that want the same. None: no target."""

    name: str
    share: float = 1.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    priority: int = 0
    preemptible: bool = False
    """May be interrupted by more urgent ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    at_s: float
    input_tokens: int
    output_tokens: int
    sla: SlaClass
    hash_ids: tuple[int, ...] = ()
    """Of the prompt's blocks, where the trace says which prompts begin alike."""

    def tokens(self, index: int) -> list[int]:
        """Every token of a block is its id. What no other prompt begins with is `index`'s own."""
        own = [_OWN + index]
        if not self.hash_ids:
            return own * self.input_tokens
        tokens: list[int] = []
        for block in self.hash_ids:
            tokens += [block] * PREFIX_BLOCK_TOKENS
        del tokens[self.input_tokens :]
        return tokens + own * (self.input_tokens - len(tokens))


def from_trace(
    rows: Sequence[TraceRow], classes: Sequence[SlaClass], *, speed: float, seed: int, max_tokens: int
) -> list[Arrival]:
    """The rows, `speed` times as fast, lengths cut to what a context of `max_tokens` holds."""
    if speed <= 0 or max_tokens < 2:
        raise ConfigError(f"wanted speed > 0 and max_tokens > 1, got {speed} and {max_tokens}")
    draw = _Drawer(classes, seed)
    arrivals = []
    for row in rows:
        prompt = min(max(row.input_tokens, 1), max_tokens - 1)
        answer = min(max(row.output_tokens, 1), max_tokens - prompt)
        arrivals.append(
            Arrival(
                at_s=row.at_s / speed,
                input_tokens=prompt,
                output_tokens=answer,
                sla=draw(),
                hash_ids=row.hash_ids,
            )
        )
    return arrivals


def generated(
    lengths: Sequence[TraceRow],
    classes: Sequence[SlaClass],
    *,
    arrivals: Arrivals,
    rate: float,
    duration_s: float,
    seed: int,
    max_tokens: int,
) -> list[Arrival]:
    """Times of a process, lengths drawn in pairs from `lengths`."""
    times = arrivals.times(rate, duration_s, np.random.default_rng(seed))
    rng = random.Random(f"{seed}/lengths")
    rows = [replace(rng.choice(lengths), at_s=at) for at in times]
    return from_trace(rows, classes, speed=1.0, seed=seed, max_tokens=max_tokens)


class _Drawer:
    def __init__(self, classes: Sequence[SlaClass], seed: int) -> None:
        if not classes:
            raise ConfigError("a workload needs at least one class")
        self._classes, self._weights = list(classes), [c.share for c in classes]
        self._rng = random.Random(f"{seed}/classes")

    def __call__(self) -> SlaClass:
        return self._rng.choices(self._classes, self._weights)[0]
