"""Answers that a modelled worker writes together.

Its steps are not simulated one by one: between two changes of the batch they follow from a quadratic equation
(every step is longer than the one before by what the batch has written). Steps that also read prompts are one
event each: see `worker`.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from coordinator.simulator.profile import Profile
from pdserve.core.ids import AttemptId
from pdserve.core.messages import FinishReason, RequestSpec, Tokens


@dataclass(slots=True)
class Answer:
    spec: RequestSpec
    blocks: int
    written: int
    """Tokens of the answer that are known when it joins the batch."""
    began: float = -1.0
    """Steps done when it joined the batch; below 0 before that."""

    @property
    def to_write(self) -> int:
        """Tokens that this worker writes of it."""
        return max(self.spec.sampling.max_tokens - self.written, 0)

    @property
    def context(self) -> int:
        """Tokens before it, once it joins the batch."""
        return self.spec.num_prompt_tokens + self.written

    def tokens(self, count: int, reason: FinishReason | None = None) -> Tokens:
        """Those after the first, in one message: only when the last one comes is measured."""
        return Tokens(
            attempt=self.spec.attempt, first_index=self.written, tokens=[0] * count, finish_reason=reason
        )


class Batch:
    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.answers: dict[AttemptId, Answer] = {}
        """With those whose KV is awaited."""
        self.held = 0
        """Blocks."""
        self.running = 0
        self.context = 0.0
        """Tokens before all that run."""
        self.steps = 0.0
        self.busy_s = 0.0
        self.last_step_s = 0.0
        self._ends: list[tuple[float, int, AttemptId]] = []
        self._order = 0
        self._at = 0.0

    def reserve(self, spec: RequestSpec, blocks: int) -> None:
        self.held += blocks
        self.answers[spec.attempt] = Answer(spec, blocks, spec.num_output_tokens + 1)

    def join(self, answer: Answer) -> None:
        answer.began = self.steps
        self.running += 1
        self.context += answer.context
        self._order += 1
        heapq.heappush(self._ends, (self.steps + answer.to_write, self._order, answer.spec.attempt))

    def leave(self, attempt: AttemptId) -> None:
        answer = self.answers.pop(attempt, None)
        if answer is None:
            return
        self.held -= answer.blocks
        if answer.began >= 0:
            self.running -= 1
            self.context -= answer.context + self.steps - answer.began

    def advance(self, now: float) -> None:
        """By the steps that were taken since the last change, none of which read a prompt."""
        elapsed = now - self._at
        self._at = now
        if not self.running or elapsed <= 0:
            return
        first = self._profile.step_s(self.running, self.context)
        growth = self._profile.decode_context * self.running
        steps = 2 * elapsed / (first + math.sqrt(first * first + 2 * growth * elapsed))
        self.steps += steps
        self.context += self.running * steps
        self.busy_s += elapsed
        self.last_step_s = first

    def stepped(self, seconds: float, now: float) -> None:
        """One step that took so long, with a chunk of prompts in it."""
        self.steps += 1
        self.context += self.running
        self.busy_s += seconds
        self.last_step_s = seconds
        self._at = now

    def next_end_s(self) -> float | None:
        """Until the first of them is complete, if all stay alone; None: none runs."""
        ends = self._ends
        while ends and ends[0][2] not in self.answers:
            heapq.heappop(ends)
        if not ends:
            return None
        steps = max(ends[0][0] - self.steps, 0.0)
        growth = self._profile.decode_context * self.running
        return steps * self._profile.step_s(self.running, self.context) + growth * steps * steps / 2

    def complete(self) -> list[Tokens]:
        """What the last step completed; it leaves."""
        told: list[Tokens] = []
        ends = self._ends
        while ends and (ends[0][0] <= self.steps + 1e-6 or ends[0][2] not in self.answers):
            answer = self.answers.get(heapq.heappop(ends)[2])
            if answer is not None:
                told.append(answer.tokens(answer.to_write, FinishReason.LENGTH))
                self.leave(answer.spec.attempt)
        return told

    def written(self, answer: Answer) -> int:
        """Here, so far; never the last one, which ends it."""
        if answer.began < 0:
            return 0
        return max(min(int(self.steps - answer.began), answer.to_write - 1), 0)
