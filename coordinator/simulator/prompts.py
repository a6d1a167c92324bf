"""Prompts that a modelled worker has to read: the most urgent first, in chunks, without what it has."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import RequestSpec

Urgency = tuple[float, int, float, int]


@dataclass(slots=True)
class Prompt:
    spec: RequestSpec
    to: WorkerId | None
    """Who gets its KV; None: it stays here."""
    order: Urgency
    received: float
    done: int = 0
    there: int = 0
    """Tokens whose KV need not be sent, as who gets it has it."""
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a prompt, read in one step."""

    prompt: Prompt
    start: int
    end: int


@dataclass(slots=True)
class PromptQueue:
    waiting: list[tuple[Urgency, AttemptId]] = field(default_factory=list)
    prompts: dict[AttemptId, Prompt] = field(default_factory=dict)
    tokens_left: int = 0
    count: int = 0

    def add(
        self, spec: RequestSpec, to: WorkerId | None, now: float, *, cached: int = 0, there: int = 0
    ) -> None:
        """cached: tokens at its beginning that need not be read. there: that need not be sent."""
        self.count += 1
        due = math.inf if spec.ttft_deadline is None else spec.ttft_deadline
        prompt = Prompt(spec, to, (due, spec.priority, spec.arrival, self.count), now, cached, there)
        self.prompts[spec.attempt] = prompt
        self.tokens_left += len(spec.tokens) - cached
        heapq.heappush(self.waiting, (prompt.order, spec.attempt))

    def discard(self, attempt: AttemptId) -> None:
        prompt = self.prompts.pop(attempt, None)
        if prompt is not None:
            self.tokens_left -= len(prompt.spec.tokens) - prompt.done

    def reached(self, chunk: Chunk, seconds: float) -> bool:
        """A step has ended. Whether the prompt is still wanted; it leaves the queue with its last chunk."""
        prompt = chunk.prompt
        attempt = prompt.spec.attempt
        if self.prompts.get(attempt) is not prompt:
            return False
        self.tokens_left -= chunk.end - prompt.done
        prompt.done = chunk.end
        prompt.compute_s += seconds
        if chunk.end >= len(prompt.spec.tokens):
            del self.prompts[attempt]
        return True

    def chunks(self, budget: int) -> list[Chunk]:
        """Of the next step, most urgent first."""
        taken: list[Chunk] = []
        back: tuple[Urgency, AttemptId] | None = None
        while budget > 0 and self.waiting:
            order, attempt = heapq.heappop(self.waiting)
            prompt = self.prompts.get(attempt)
            if prompt is None or prompt.order != order:
                continue  # withdrawn
            end = min(len(prompt.spec.tokens), prompt.done + budget)
            budget -= end - prompt.done
            taken.append(Chunk(prompt, prompt.done, end))
            if end < len(prompt.spec.tokens):
                back = (order, attempt)  # only the last one can be cut
        if back is not None:
            heapq.heappush(self.waiting, back)
        return taken


def work(chunks: list[Chunk]) -> tuple[int, float]:
    """(tokens, pairs of a token and one before it) of a step."""
    tokens, pairs = 0, 0.0
    for chunk in chunks:
        tokens += chunk.end - chunk.start
        pairs += (chunk.end * chunk.end - chunk.start * chunk.start) / 2
    return tokens, pairs
