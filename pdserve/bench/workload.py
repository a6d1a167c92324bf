"""What is sent and when: made from a scenario, a rate and a seed, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from pdserve.bench.scenario import Replay, RequestClass, Scenario
from pdserve.bench.slo import Slo
from pdserve.bench.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from pdserve.core.errors import ConfigError

_PREFIX_STREAM: Final = 1
_BLOCK_STREAM: Final = 2
_TEXT_STREAM: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    new_tokens: tuple[int, ...]
    """Appended to all that was said before in the session."""
    output_tokens: int
    think_s: float
    """After the answer before it; 0 for the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One arrival; most have one turn."""

    index: int
    at_s: float
    class_name: str
    slo: Slo
    priority: int
    turns: tuple[Turn, ...]
    warmup: bool = False


@dataclass(slots=True)
class Workload:
    sessions: list[Session] = field(default_factory=list)
    duration_s: float = 0.0
    """With warm-up."""
    num_clipped: int = 0
    """Requests made shorter than the scenario or trace says, to fit the model's context or a limit."""


def build_workload(
    scenario: Scenario,
    rate: float,
    seed: int,
    limits: ServerLimits,
    *,
    trace: Sequence[TraceRow] = (),
    salt: int = 0,
) -> Workload:
    """Arrivals at `rate` per second for warm-up and duration. `trace`: what is replayed, if that is so.

    Times and lengths come from scenario, rate and seed. What the prompts say depends on `salt` too: no trial
    finds the prompts of another in a prefix cache. Only a class's `shared_prefix` is always the same.
    """
    random = np.random.default_rng([scenario.seed, seed])
    total_s = scenario.warmup_s + scenario.duration_s
    maker = _Maker(scenario, (salt, seed, round(rate * 1e6)), limits)
    if scenario.replay is not None:
        for at_s, row in _slice_of(trace, rate, total_s, random):
            maker.add_row(at_s, row, scenario.replay, scenario.classes[0])
    else:
        weights = np.array([one.weight for one in scenario.classes])
        for at_s in scenario.arrivals.times(rate, total_s, random):
            chosen = scenario.classes[int(random.choice(len(weights), p=weights / weights.sum()))]
            maker.add_session(at_s, chosen, random)
    maker.workload.duration_s = total_s
    return maker.workload


class _Maker:
    def __init__(self, scenario: Scenario, trial: tuple[int, ...], limits: ServerLimits) -> None:
        self._scenario, self._trial, self._limits = scenario, trial, limits
        self.workload = Workload()

    def add_session(self, at_s: float, chosen: RequestClass, random: np.random.Generator) -> None:
        index = len(self.workload.sessions)
        said = 0
        turns: list[Turn] = []
        for number in range(chosen.sessions.turns.draw(random)):
            wanted_in, wanted_out = chosen.input.draw(random), chosen.output.draw(random)
            think_s = float(random.exponential(chosen.sessions.think_s)) if number else 0.0
            shared = chosen.shared_prefix if number == 0 else 0
            fits = self._fit(said + shared + wanted_in, wanted_out)
            if fits is None or fits[0] <= said + shared:
                self.workload.num_clipped += 1
                if turns:
                    break  # the conversation has filled the context
                raise ConfigError(
                    f"class {chosen.name}: a prefix of {shared} tokens leaves no room in a context of "
                    f"{self._limits.max_model_len}"
                )
            self.workload.num_clipped += fits != (said + shared + wanted_in, wanted_out)
            prefix = self._tokens(shared, _PREFIX_STREAM, self._scenario.classes.index(chosen))
            fresh = self._tokens(fits[0] - said - shared, _TEXT_STREAM, *self._trial, index, number)
            turns.append(Turn(new_tokens=(*prefix, *fresh), output_tokens=fits[1], think_s=think_s))
            said = fits[0] + fits[1]
        self._append(at_s, chosen, tuple(turns))

    def add_row(self, at_s: float, row: TraceRow, replay: Replay, chosen: RequestClass) -> None:
        block = max(1, round(MOONCAKE_BLOCK_TOKENS * replay.length_scale))
        wanted_in = max(1, round(row.input_tokens * replay.length_scale))
        wanted_out = max(1, round(row.output_tokens * replay.length_scale))
        fits = self._fit(min(wanted_in, replay.max_input), min(wanted_out, replay.max_output))
        if fits is None:
            raise ConfigError(f"a context of {self._limits.max_model_len} holds no request")
        self.workload.num_clipped += fits != (wanted_in, wanted_out)
        tokens: list[int] = []
        for hash_id in row.hash_ids[: -(-fits[0] // block)]:
            tokens += self._tokens(block, _BLOCK_STREAM, *self._trial, hash_id)
        index = len(self.workload.sessions)
        tokens += self._tokens(max(0, fits[0] - len(tokens)), _TEXT_STREAM, *self._trial, index, 0)
        turn = Turn(new_tokens=tuple(tokens[: fits[0]]), output_tokens=fits[1], think_s=0.0)
        self._append(at_s, chosen, (turn,))

    def _append(self, at_s: float, chosen: RequestClass, turns: tuple[Turn, ...]) -> None:
        session = Session(
            index=len(self.workload.sessions),
            at_s=at_s,
            class_name=chosen.name,
            slo=chosen.targets,
            priority=chosen.priority,
            turns=turns,
            warmup=at_s < self._scenario.warmup_s,
        )
        self.workload.sessions.append(session)

    def _fit(self, num_in: int, num_out: int) -> tuple[int, int] | None:
        """Lengths that fit the context; the answer is kept, the prompt shortened, where possible."""
        room = self._limits.max_model_len
        num_out = min(num_out, max(1, room // 2))
        num_in = min(num_in, room - num_out)
        return (num_in, num_out) if num_in >= 1 else None

    def _tokens(self, count: int, *stream: int) -> list[int]:
        """Random ids off the ends of the vocabulary, where special tokens are. Equal streams, equal ids."""
        if count <= 0:
            return []
        low, high = self._limits.vocab_size // 16, self._limits.vocab_size * 3 // 4
        random = np.random.default_rng([self._scenario.seed, *stream])
        return [int(token) for token in random.integers(low, high, size=count)]


def _slice_of(
    trace: Sequence[TraceRow], rate: float, total_s: float, random: np.random.Generator
) -> list[tuple[float, TraceRow]]:
    """A stretch of the trace that holds `total_s` at `rate`, its pauses scaled to that mean."""
    wanted = max(1, round(rate * total_s))
    if wanted > len(trace):
        raise ConfigError(
            f"the trace has {len(trace)} requests, and {wanted} are needed for {total_s:g} s at {rate:g} per "
            "second; use a shorter duration_s or a lower rate"
        )
    first = int(random.integers(0, len(trace) - wanted + 1))
    rows = trace[first : first + wanted]
    if first + wanted < len(trace):
        span_s = trace[first + wanted].at_s - rows[0].at_s
    else:  # the last row's own gap is not known: a mean one
        span_s = (rows[-1].at_s - rows[0].at_s) * wanted / max(1, wanted - 1)
    scale = total_s / span_s if span_s > 0 else 0.0
    return [((row.at_s - rows[0].at_s) * scale, row) for row in rows]
