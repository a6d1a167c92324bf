"""Who reads a prompt: a prefill worker, whose KV then moves, or the decode worker itself. One cost for both.

    cost = 1000 x violation + TTFT + KV still under way then + what all others lose by it      (seconds)

    read at P    others: as many prompts will come behind this one as wait at P now, and each waits for it
    read at D    others: each answer that D writes meanwhile pauses for it; those that arrive meanwhile, half
                 of it on average; prompts that D reads itself wait behind it as at P
    violation    of its own targets; at D also of the answers there that have a TPOT target: over their next
                 tokens, what D reads counts as time between them

So D helps while prompts queue at P and D has little to write, and the more D has to write, the longer the
queue must be before it does. An idle P reads what it is given: a margin keeps D free for what comes next.
"""

from __future__ import annotations

from typing import Final

from coordinator.decisions import Route
from coordinator.fleet import WorkerState
from coordinator.latency import Work
from coordinator.linear_fit import LinearFit
from coordinator.links import Links
from coordinator.sla import (
    VIOLATION_WEIGHT,
    Goal,
    late,
    reading_s,
    reading_std_s,
    step_s,
    steps_between_s,
    work_until,
)
from pdserve.core.ids import WorkerId

WINDOW_TOKENS: Final = 32
"""Of a running answer, over which a pause may be made up for."""
LEAST_SPARE: Final = 0.02
"""Part of a TPOT target that is taken to be left at least."""
_KNOWN: Final = 5
"""Prompts that a decode worker must have read before its own speed counts; until then, a prefill worker's."""
MOST_TIMES_SLOWER: Final = 2.0
"""A decode worker is believed to read, at most, than the prefill worker beside it."""
MARGIN: Final = 0.5
"""Of the time that the prompt takes to read: reading it at D must be cheaper by this much."""


MIN_GAIN_S: Final = 0.02
"""And by this much: less is not worth a pause in the answers to come."""


def exposed_s(links: Links, prefill: WorkerState, decode: WorkerId, size_bytes: int) -> float:
    """KV still under way after the prompt has been read: at this pair's speed, behind what is under way."""
    if size_bytes <= 0:
        return 0.0
    alone_s = prefill.latency.exposed_s(size_bytes) * links.relative(prefill.id, decode)
    return alone_s + links.wait_s(prefill.id, decode)


def remote_route(
    links: Links,
    prefill: WorkerState,
    decode: WorkerState,
    tokens: int,
    goal: Goal,
    *,
    cached: int,
    cached_at_decode: int,
) -> Route:
    """cached: of the prompt at the prefill worker. What the decode worker has is not moved."""
    fit = prefill.latency.prefill
    work = work_until(prefill, tokens, goal, cached)
    ttft_s, ttft_std_s = reading_s(prefill, work), reading_std_s(prefill, work)
    size_bytes = max(tokens - cached_at_decode, 0) * decode.kv_token_bytes
    alone_s = fit.predict(Work.of(min(cached, tokens - 1), tokens, ends=True).features)
    return _route(
        prefill,
        decode,
        tokens,
        goal,
        ttft_s=ttft_s,
        ttft_std_s=ttft_std_s,
        late_s=exposed_s(links, prefill, decode.id, size_bytes),
        alone_s=alone_s,
        # Answers that it keeps pause for it.
        others_s=alone_s * (len(prefill.prefill_left) + prefill.num_decoding),
        spoilt=0.0,
    )


def local_route(
    decode: WorkerState, tokens: int, goal: Goal, *, cached: int, like: WorkerState | None
) -> Route:
    """like: the prefill worker that could read it instead, whose speed is taken while the decode worker's own
    is not known. None: there is none."""
    prompt = Work.of(min(cached, tokens - 1), tokens, ends=True)
    fit, scale = _reading_fit(decode, like, prompt)
    work = work_until(decode, tokens, goal, cached)
    alone_s = scale * fit.predict(prompt.features)
    if fit is decode.latency.prefill and scale == 1.0:
        ttft_s, ttft_std_s = reading_s(decode, work), reading_std_s(decode, work)
    else:
        ttft_s = scale * fit.predict(work.features) + steps_between_s(decode, work.tokens)
        ttft_std_s = scale * fit.std(work.features)
    others = decode.num_decoding + decode.num_arriving / 2 + len(decode.prefill_left)
    others *= _weight(decode)
    return _route(
        None,
        decode,
        tokens,
        goal,
        ttft_s=ttft_s,
        ttft_std_s=ttft_std_s,
        late_s=0.0,
        alone_s=alone_s,
        others_s=alone_s * others,
        spoilt=_spoilt(decode, alone_s + scale * fit.predict(decode.work_left.features)),
    )


def _weight(decode: WorkerState) -> float:
    """Of a second that an answer there waits: the less its TPOT target leaves to spare, the more it costs, as
    it takes that from those who could be written beside it. One where nobody has a target.
    """
    tightest_s, count = decode.tpot_targets
    if not count:
        return 1.0
    share = min(count / max(len(decode.blocks_placed), 1), 1.0)
    batch = decode.batch
    step_s = decode.latency.step_s(*batch) + decode.latency.decode.std((1, *batch))
    spare = max(1 - step_s / tightest_s, LEAST_SPARE) if tightest_s > 0 else LEAST_SPARE
    return 1 - share + share / spare


def _reading_fit(decode: WorkerState, like: WorkerState | None, prompt: Work) -> tuple[LinearFit, float]:
    """A model of how a decode worker reads, and what to multiply it with.

    It learns only from what it is given to read: were it believed to be slow without limit, that would never
    be tried again.
    """
    own = decode.latency.prefill
    if like is None:
        return own, 1.0
    other = like.latency.prefill
    if own.count < _KNOWN:
        return other, 1.0
    slowest = MOST_TIMES_SLOWER * other.predict(prompt.features)
    if other.count >= _KNOWN and own.predict(prompt.features) > slowest:
        return other, MOST_TIMES_SLOWER
    return own, 1.0


def local_pays(local: Route, remote: Route) -> bool:
    """Reading at the decode worker is cheaper, by enough."""
    return local.cost + max(MARGIN * local.alone_s, MIN_GAIN_S) < remote.cost


def _spoilt(decode: WorkerState, reading_s: float) -> float:
    """By how much answers there miss their TPOT targets if it reads for so long: the tightest, times all."""
    tightest_s, count = decode.tpot_targets
    if not count:
        return 0.0
    step = decode.latency.step_s(*decode.batch)
    # Late as they may be anyway, this is not what spoils them.
    return count * max(late(step + reading_s / WINDOW_TOKENS, tightest_s) - late(step, tightest_s), 0.0)


def _route(
    prefill: WorkerState | None,
    decode: WorkerState,
    tokens: int,
    goal: Goal,
    *,
    ttft_s: float,
    ttft_std_s: float,
    late_s: float,
    alone_s: float,
    others_s: float,
    spoilt: float,
) -> Route:
    batch = decode.batch_with(tokens)
    tpot_s = step_s(decode, tokens) + late_s / max(min(goal.answer_tokens, WINDOW_TOKENS), 1)
    violation = late(ttft_s, goal.ttft_s) + late(tpot_s, goal.tpot_s) + spoilt
    return Route(
        prefill=None if prefill is None else prefill.id,
        decode=decode.id,
        ttft_s=ttft_s,
        ttft_std_s=ttft_std_s,
        tpot_s=tpot_s,
        tpot_std_s=decode.latency.decode.std((1, *batch)),
        exposed_s=late_s,
        alone_s=alone_s,
        others_s=others_s,
        violation=violation,
        cost=VIOLATION_WEIGHT * violation + ttft_s + late_s + others_s,
    )
