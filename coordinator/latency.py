"""How long a worker takes, learned from what it reports: what routing and admission predict with.

    prefill   seconds = a * prompts + b * tokens + c * (tokens x context)   every step that ends, as heard
    decode    seconds = d + e * sequences + f * context tokens               a step, from heartbeats
    exposed   seconds = g + h * bytes                                        KV under way after prefill ended
    mixed     seconds = i * steps + j * tokens + k * (tokens x context)      steps that read and write
                        + steps x (l * sequences + m * context tokens)

A decode worker that reads prompts takes both at once. What a step of both takes is learned as one, since a
fused pass takes less than the two: a prompt takes as many of them as it has chunks, whose size is learned
too. Its decode is learned from heartbeats between which it read nothing, its prefill from steps less what its
answers take of them; how much longer its steps are on average for what it reads is kept beside them.

Prefill is additive in its features, so that the time until a whole queue has been read is one product with
the queue's sums. It is learned from what passes between two frames of a busy worker, not from the time that
a prompt says it took: prompts share steps, and each counts the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from coordinator.linear_fit import LinearFit
from pdserve.core.ids import AttemptId
from pdserve.core.messages import Heartbeat, TransferDone
from pdserve.core.worker_state import ProfileStep

ASSUMED_TOKENS_PER_S: Final = 1000.0
"""Prefill speed of a worker of which nothing is known yet."""
_PREFILL_PRIOR: Final = (100 / ASSUMED_TOKENS_PER_S, 1 / ASSUMED_TOKENS_PER_S, 5e-5 / ASSUMED_TOKENS_PER_S)
_DECODE_PRIOR: Final = (1e-2, 1e-4, 1e-7)
_EXPOSED_PRIOR: Final = (1e-3, 1e-9)
_MIXED_PRIOR: Final = (_DECODE_PRIOR[0], *_PREFILL_PRIOR[1:], *_DECODE_PRIOR[1:])
_CHUNK_TOKENS: Final = 512.0
"""Of prompts that a decode worker reads in one step, until it is known; the default of
`decode.max_num_batched_tokens`."""
_MIXED_KNOWN: Final = 5
"""Steps with prompts and answers before they are predicted as one."""
_LEAST_READING: Final = 0.25
"""Of a step in which a prompt was read, that the reading took at least."""
_TRACK: Final = 0.1
"""Of the newest heartbeat in the moving average of what reading adds to a step."""
_SAME_FRAME_S: Final = 5e-4
"""Messages of one step come in one frame and are handled within this time."""


@dataclass(slots=True)
class Work:
    """Prompts to read, in the features of prefill. Sums of work are work. Never changed; not frozen, as that
    triples the time to make one, and a decision makes dozens.
    """

    prompts: int = 0
    tokens: int = 0
    pairs: float = 0.0
    """Sum over the tokens of the tokens before each: what attention computes."""

    @classmethod
    def of(cls, start: int, end: int, *, ends: bool) -> Work:
        """Tokens [start, end) of a prompt. ends: its last token is among them."""
        return cls(int(ends), end - start, (end * end - start * start) / 2)

    def __add__(self, other: Work) -> Work:
        return Work(self.prompts + other.prompts, self.tokens + other.tokens, self.pairs + other.pairs)

    def __sub__(self, other: Work) -> Work:
        return Work(self.prompts - other.prompts, self.tokens - other.tokens, self.pairs - other.pairs)

    @property
    def features(self) -> tuple[float, float, float]:
        return (self.prompts, self.tokens, self.pairs)


@dataclass(slots=True)
class _Steps:
    """Cuts what a worker says about its prompts into steps, each with its time and its work."""

    reading: dict[AttemptId, tuple[int, int]] = field(default_factory=dict)
    """(Tokens computed or cached, tokens in all) of prompts that were sent and not read yet."""
    since: float = 0.0
    """End of the frame before, or when the first prompt was sent to an idle worker."""
    frame: float | None = None
    """When the frame came that is being heard; None: nothing heard since `since`."""
    work: Work = field(default_factory=Work)
    spoiled: bool = False
    """Some of what the time since `since` went into was never told."""
    cut: bool = False
    """A prompt did not fit into the step as a whole: it read as much as it may."""

    def close(self, now: float) -> tuple[float, Work, bool] | None:
        """The last frame's seconds, its work and whether it was cut, once what is heard at `now` cannot
        belong to it."""
        if self.frame is None or now - self.frame <= _SAME_FRAME_S:
            return None
        seconds, work, spoiled, cut = self.frame - self.since, self.work, self.spoiled, self.cut
        self.begin(self.frame)
        return None if spoiled else (seconds, work, cut)

    def begin(self, since: float) -> None:
        self.since, self.frame, self.work = since, None, Work()
        self.spoiled = self.cut = False


class LatencyModel:
    """Of one worker. Times are on the registry's clock, in seconds."""

    def __init__(self, like: LatencyModel | None = None) -> None:
        """like: of a worker of the same kind, whose coefficients are a better beginning than ours."""

        self.prefill: LinearFit = _fit(_PREFILL_PRIOR, None if like is None else like.prefill)
        self.decode: LinearFit = _fit(_DECODE_PRIOR, None if like is None else like.decode)
        self.exposed: LinearFit = _fit(_EXPOSED_PRIOR, None if like is None else like.exposed)
        self.mixed: LinearFit = _fit(_MIXED_PRIOR, None if like is None else like.mixed)
        self.chunk_tokens: float = _CHUNK_TOKENS if like is None else like.chunk_tokens
        """Of prompts, that a decode worker reads in one step at most."""
        self.reading_adds_s = 0.0
        """To an average step of late, for the prompts that were read in between. Below zero where steps
        without any have never been seen, so that what they take was guessed too high."""
        self._steps = _Steps()
        self._read_since_beat = False
        self._decoding: tuple[int, int] = (0, 0)
        self._num_steps = 0
        self._busy_s = 0.0

    def fits(self) -> dict[str, LinearFit]:
        """By what they predict."""
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "mixed": self.mixed,
            "transfer": self.exposed,
        }

    @property
    def num_steps(self) -> int:
        """With answers in them, that it has learned from."""
        return self.decode.count + self.mixed.count

    # --- what it learns from --------------------------------------------------------------------------

    def profiled(self, steps: Iterable[ProfileStep]) -> None:
        """What the worker measured before it took requests."""
        for step in steps:
            if step.prompt_tokens:
                self.prefill.learn(Work.of(0, step.prompt_tokens, ends=True).features, step.seconds)
            else:
                self.decode.learn((1, step.sequences, step.context_tokens), step.seconds)

    def prompt_sent(self, attempt: AttemptId, tokens: int, now: float) -> None:
        steps = self._steps
        if not steps.reading:
            self._close(now)
            steps.begin(now)
        steps.reading[attempt] = (0, tokens)

    def prompt_cached(self, attempt: AttemptId, cached: int) -> None:
        """It need not be read from the beginning."""
        known = self._steps.reading.get(attempt)
        if known is not None:
            self._steps.reading[attempt] = (cached, known[1])

    def prompt_reached(self, attempt: AttemptId, tokens_done: int, now: float) -> None:
        """A step ended with `tokens_done` tokens of this prompt computed."""
        known = self._steps.reading.get(attempt)
        if known is None or tokens_done <= known[0]:
            return
        self._close(now)
        self._read_since_beat = True
        ends = tokens_done >= known[1]
        steps = self._steps
        steps.work += Work.of(known[0], tokens_done, ends=ends)
        steps.frame = now if steps.frame is None else steps.frame
        if ends:
            del steps.reading[attempt]
        else:
            steps.reading[attempt] = (tokens_done, known[1])
            steps.cut = True

    def prompt_read(self, attempt: AttemptId, now: float) -> None:
        known = self._steps.reading.get(attempt)
        if known is not None:
            self.prompt_reached(attempt, known[1], now)

    def prompt_dropped(self, attempt: AttemptId) -> None:
        """Taken back or failed. What it took of the step under way is not told, so that teaches nothing."""
        if self._steps.reading.pop(attempt, None) is not None:
            self._steps.spoiled = True

    def _close(self, now: float) -> None:
        step = self._steps.close(now)
        if step is None or step[0] <= _SAME_FRAME_S:
            return
        seconds, work, cut = step
        if self._decoding[0]:
            self.mixed.learn((1, work.tokens, work.pairs, *self._decoding), seconds)
            if cut:
                self.chunk_tokens += _TRACK * (work.tokens - self.chunk_tokens)
            if self.decode.count:
                seconds = max(seconds - self.step_s(*self._decoding), seconds * _LEAST_READING)
        self.prefill.learn(work.features, seconds)

    def writes(self, seqs: int, context_tokens: int) -> None:
        """What its steps write from now on, besides what they read."""
        self._decoding = (seqs, context_tokens)

    def heard(self, beat: Heartbeat, *, reads: bool = False) -> None:
        """Its average step since the heartbeat before, with the batch that it has.

        reads: most of its steps read prompts. Then those alone say how it writes between which it read none.
        """
        num_steps, busy_s = beat.steps - self._num_steps, beat.busy_s - self._busy_s
        read = self._read_since_beat or bool(self._steps.reading)
        self._num_steps, self._busy_s, self._read_since_beat = beat.steps, beat.busy_s, False
        self._decoding = (beat.running, beat.waiting_tokens)
        if num_steps <= 0 or beat.running <= 0:
            return
        step_s = busy_s / num_steps if busy_s > 0 else beat.step_s
        if step_s <= 0:
            return
        batch = (1, beat.running, beat.waiting_tokens)
        if read and reads:
            return
        if read and self.decode.count:
            more_s = step_s - self.decode.predict(batch)
            self.reading_adds_s += _TRACK * (more_s - self.reading_adds_s)
        else:
            self.reading_adds_s *= 1 - _TRACK
            self.decode.learn(batch, step_s)

    def transferred(self, done: TransferDone) -> None:
        # Nothing was left to wait for: that is an observation too, and relative errors need more than zero.
        self.exposed.learn((1, done.bytes_moved), max(done.exposed_s, 1e-4))

    # --- what it predicts -----------------------------------------------------------------------------

    def prefill_s(self, work: Work) -> float:
        """Until all of `work` has been read."""
        return self.prefill.predict(work.features)

    def beside_s(self, work: Work, seqs: int, context_tokens: float) -> float:
        """Until all of `work` has been read in steps of this batch."""
        if self.mixed.count < _MIXED_KNOWN:
            alone_s = self.prefill.predict(work.features)
            return alone_s + self._chunks(work) * self.step_s(seqs, context_tokens)
        return self.mixed.predict(self._mixed(work, seqs, context_tokens))

    def beside_std_s(self, work: Work, seqs: int, context_tokens: float) -> float:
        """Standard deviation of an observation about `beside_s`."""
        if self.mixed.count < _MIXED_KNOWN:
            return self.prefill.std(work.features)
        return self.mixed.std(self._mixed(work, seqs, context_tokens))

    def _chunks(self, work: Work) -> int:
        return math.ceil(work.tokens / max(self.chunk_tokens, 1.0))

    def _mixed(self, work: Work, seqs: int, context_tokens: float) -> tuple[float, ...]:
        steps = self._chunks(work)
        return (steps, work.tokens, work.pairs, steps * seqs, steps * context_tokens)

    def step_s(self, seqs: int, context_tokens: float) -> float:
        return self.decode.predict((1, seqs, context_tokens))

    def exposed_s(self, size_bytes: float) -> float:
        return self.exposed.predict((1, size_bytes))


def _fit(prior: tuple[float, ...], like: LinearFit | None) -> LinearFit:
    if like is None or not like.count:
        return LinearFit(prior)
    # A coefficient that was found to be nothing there may still be something here.
    floor = max(like.coefficients) * 1e-9
    return LinearFit([max(c, floor) for c in like.coefficients], trusted=True)
