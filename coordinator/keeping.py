"""A request that a prefill worker P keeps whole: it reads the prompt and writes the answer, and no KV moves.

Beyond what a route costs up to the first token (`coordinator.routes`), an answer of A tokens costs the worker
that writes it, in a batch of n, and those beside it:

    writing = A x step(n + 1)  +  n x A x (step(n + 1) - step(n))                                  (seconds)

At P, prompts come while it writes: each pauses the answers there for its reading, and is itself read later by
the answers' part of its steps, so that both are counted for the prompts that are expected meanwhile. P keeps
a request where all of that is cheaper than moving its KV, by a margin; a long answer, only where no decode
worker has room. So an idle P keeps what is short while decode workers have much to write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator.decisions import Route
from coordinator.fleet import WorkerState
from coordinator.linear_fit import LinearFit
from coordinator.routes import MARGIN, MIN_GAIN_S, local_route
from coordinator.sla import Goal

SHORT_TOKENS: Final = 256
"""An answer that is expected to be longer is for decode workers."""
_KNOWN: Final = 5
"""Heartbeats with answers in them before a prefill worker's own speed of writing counts; until then, a decode
worker's."""
_MOST_TIMES_SLOWER: Final = 4.0
"""A prefill worker is believed to write, at most, than a decode worker: else it is never tried again."""
_BUSIEST: Final = 0.9
"""Share of its time that prompts take of a worker, at most, in a prediction."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is to come, as far as the past tells."""

    answer_tokens: float
    """Still to be written of this answer."""
    requests_per_s: float = 0.0
    """Of this model, to all of its workers."""


def takes_whole(worker: WorkerState, tokens: int) -> bool:
    """It has room for a request that it would keep, and some is left for prompts that it reads for others."""
    return worker.takes_decode() and worker.decode_load(tokens) < 1.0


def kept_route(keeper: WorkerState, tokens: int, goal: Goal, *, cached: int) -> Route:
    """cached: of the prompt at `keeper`."""
    return local_route(keeper, tokens, goal, cached=cached, like=None)


def keeping_pays(
    kept: Route,
    other: Route,
    *,
    keeper: WorkerState,
    writer: WorkerState,
    tokens: int,
    expected: Expected,
    num_readers: int,
) -> bool:
    """`kept` is cheaper by enough than `other`, of which `writer` writes the answer.

    num_readers: prefill workers, which share the prompts to come.
    """
    if expected.answer_tokens > SHORT_TOKENS:
        return False
    fit, scale = _writing_fit(keeper, writer, tokens)
    # One of which nothing is known, as after its restart, is taken to be as fast.
    there = fit if writer.latency.decode.count < _KNOWN else writer.latency.decode
    there_s = other.cost + _writing_s(there, writer, tokens, expected)
    rate = expected.requests_per_s / max(num_readers, 1)
    here_s = scale * _writing_s(fit, keeper, tokens, expected) / (1 - min(rate * kept.alone_s, _BUSIEST))
    # As many prompts will come behind this one as wait now, and answers pause while they are read.
    waiting = keeper.work_left
    here_s += keeper.latency.prefill_s(waiting) if waiting.prompts else 0.0
    seqs, context = keeper.batch
    longer_s = fit.predict((1, seqs + 1, context + tokens)) - (fit.predict((1, seqs, context)) if seqs else 0)
    here_s += scale * max(longer_s, 0.0) * (waiting.prompts + rate * here_s)
    return kept.cost + here_s + max(MARGIN * kept.alone_s, MIN_GAIN_S) < there_s


def _writing_fit(keeper: WorkerState, writer: WorkerState, tokens: int) -> tuple[LinearFit, float]:
    """A model of how `keeper` writes, and what to multiply it with."""
    own, other = keeper.latency.decode, writer.latency.decode
    if own.count < _KNOWN:
        return other, 1.0
    batch = (1, *keeper.batch_with(tokens))
    if other.count >= _KNOWN and own.predict(batch) > _MOST_TIMES_SLOWER * other.predict(batch):
        return other, _MOST_TIMES_SLOWER
    return own, 1.0


def _writing_s(fit: LinearFit, worker: WorkerState, tokens: int, expected: Expected) -> float:
    """This answer's time, and what those beside it lose."""
    seqs, context = worker.batch
    with_it = fit.predict((1, seqs + 1, context + tokens))
    longer = max(with_it - fit.predict((1, seqs, context)), 0.0) if seqs else 0.0
    return expected.answer_tokens * (with_it + seqs * longer)
