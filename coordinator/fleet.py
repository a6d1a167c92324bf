"""What the coordinator knows of its workers: who lives, what is placed there, what they said last."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.account import Pace
from coordinator.latency import ASSUMED_TOKENS_PER_S, LatencyModel, Work
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import Heartbeat, Role, WorkerInfo


@dataclass(slots=True, kw_only=True)
class WorkerState:
    info: WorkerInfo
    model: str
    heartbeat: Heartbeat | None = None
    draining: bool = False
    drain_asked: bool = False
    """By an operator; a worker that goes by itself says so in its heartbeats."""
    drain_until: float | None = None
    """When its requests start over elsewhere, on the registry's clock."""
    met: set[tuple[WorkerId, int]] = field(default_factory=set)
    """Decode workers, with their epochs, that this one was introduced to for a move."""
    num_heard: int = 0
    """Heartbeats."""
    redialling: bool = False
    """Its connection ended, and is being made again."""
    up: bool = True
    """False: silent or disconnected, though its process may live."""
    full: bool = False
    """Refused for want of room, and nothing has been heard since that may have made some."""
    window: int = field(init=False)
    """How many offers may wait for an answer: as many as it runs at once; after a refusal one, and one more
    for each that is taken."""
    unanswered: set[AttemptId] = field(default_factory=set)
    """Offered with `StartDecode`, neither reserved nor refused yet."""
    blocks_placed: dict[AttemptId, int] = field(default_factory=dict)
    prefill_left: dict[AttemptId, int] = field(default_factory=dict)
    """Prompt tokens not yet computed, per attempt placed here."""
    tokens_per_s: float = ASSUMED_TOKENS_PER_S
    latency: LatencyModel = field(default_factory=LatencyModel)
    pace: Pace = field(default_factory=Pace)
    kv_token_bytes: int = field(init=False)
    """What one token's KV takes in this worker's pool."""
    _blocks_sum: int = 0
    _prefill_sum: int = 0
    _pairs_sum: float = 0.0
    _prefill_totals: dict[AttemptId, int] = field(default_factory=dict)
    _due: dict[AttemptId, float] = field(default_factory=dict)
    _latest_due: float = -math.inf

    @property
    def id(self) -> WorkerId:
        return self.info.worker

    def __post_init__(self) -> None:
        self.window = self.info.max_num_seqs
        self.kv_token_bytes = sum(
            layout.block_bytes // layout.block_tokens for layout in self.info.fingerprint.layouts
        )

    def takes_decode(self) -> bool:
        return self.up and not self.draining and not self.full and len(self.unanswered) < self.window

    def reserved(self, attempt: AttemptId) -> None:
        self.unanswered.discard(attempt)
        self.window += 1

    def refused(self) -> None:
        """It has no room: ask again when there may be some, and carefully."""
        self.full, self.window = True, 1

    def place_decode(self, attempt: AttemptId, tokens: int) -> None:
        blocks = blocks_for(tokens + 1, self.info.block_tokens)
        self.blocks_placed[attempt] = blocks
        self._blocks_sum += blocks
        self.unanswered.add(attempt)

    def place_prefill(self, attempt: AttemptId, tokens: int, due: float = math.inf) -> None:
        """due: when its first token is due; prompts are read in this order."""
        self._due[attempt] = due
        self._latest_due = max(self._latest_due, due)
        self.prefill_left[attempt] = self._prefill_totals[attempt] = tokens
        self._prefill_sum += tokens
        self._pairs_sum += tokens * tokens / 2

    def prefill_reached(self, attempt: AttemptId, left: int) -> None:
        """`left` more tokens of this prompt to compute; 0 forgets it."""
        before = self.prefill_left.get(attempt)
        if before is None:
            return
        self._prefill_sum += left - before
        total = self._prefill_totals[attempt]
        self._pairs_sum -= ((total - left) ** 2 - (total - before) ** 2) / 2
        if left:
            self.prefill_left[attempt] = left
        else:
            del self.prefill_left[attempt], self._prefill_totals[attempt], self._due[attempt]
            if not self._due:
                self._latest_due = -math.inf

    def release(self, attempt: AttemptId) -> None:
        """The attempt has left this worker, or never got in."""
        self.unanswered.discard(attempt)
        self.prefill_reached(attempt, 0)
        self.latency.prompt_dropped(attempt)
        blocks = self.blocks_placed.pop(attempt, None)
        if blocks is not None:
            self._blocks_sum -= blocks
            self.room_may_have_appeared()

    def room_may_have_appeared(self) -> None:
        self.full = False

    @property
    def idle(self) -> bool:
        """As far as is known, all of its blocks are there to be had."""
        counts = None if self.heartbeat is None else self.heartbeat.blocks
        return counts is not None and counts.free + counts.cached == counts.total and not self.blocks_placed

    def heard(self, beat: Heartbeat) -> None:
        self.num_heard += 1
        self.heartbeat = beat
        self.draining = beat.draining or self.drain_asked
        if beat.tokens_per_s > 0:
            self.tokens_per_s = beat.tokens_per_s
        self.pace.heard(beat)
        if self.info.role is Role.DECODE:
            self.latency.heard(beat)
        self.room_may_have_appeared()

    @property
    def work_left(self) -> Work:
        """Of all prompts placed here."""
        return Work(len(self.prefill_left), self._prefill_sum, self._pairs_sum)

    def work_due(self, due: float) -> Work:
        """Of the prompts placed here that are due no later."""
        if due >= self._latest_due:
            return self.work_left
        prompts, tokens, pairs = 0, 0, 0.0
        for attempt, at in self._due.items():
            if at <= due:
                total, left = self._prefill_totals[attempt], self.prefill_left[attempt]
                prompts += 1
                tokens += left
                pairs += (total * total - (total - left) ** 2) / 2
        return Work(prompts, tokens, pairs)

    def batch_with(self, tokens: int) -> tuple[int, int]:
        """Sequences and context tokens of its steps, as far as is known, once `tokens` more have joined."""
        seqs, context = len(self.blocks_placed), self._blocks_sum * self.info.block_tokens
        beat = self.heartbeat
        if beat is not None and self.info.role is Role.DECODE:
            seqs, context = max(seqs, beat.running), max(context, beat.waiting_tokens)
        return seqs + 1, context + tokens

    def prefill_wait_s(self, tokens: int) -> float:
        """Predicted time until a prompt of `tokens` that is placed here now has been read."""
        return (self._prefill_sum + tokens) / self.tokens_per_s

    def decode_load(self, tokens: int) -> float:
        """Predicted share of the batch plus share of the blocks in use, with a context of `tokens` added.

        Blocks held beyond what is placed here are another coordinator's, or quarantined.
        """
        blocks = self._blocks_sum
        if self.heartbeat is not None:
            counts = self.heartbeat.blocks
            blocks = max(blocks, counts.held + counts.quarantined)
        blocks += blocks_for(tokens + 1, self.info.block_tokens)
        seqs = len(self.blocks_placed) + 1
        return seqs / self.info.max_num_seqs + blocks / self.info.num_blocks


class Fleet:
    """All workers by id, also those that are down but whose process may still live."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, WorkerState] = {}
        self._kinds: dict[tuple[str, Role], list[WorkerState]] = {}
        """By model and role, each in order of names."""

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._workers.values())

    def add(self, state: WorkerState) -> None:
        self.forget(state.id)
        self._workers[state.id] = state
        kind = self._kinds.setdefault((state.model, state.info.role), [])
        bisect.insort(kind, state, key=lambda s: s.id)

    def forget(self, worker: WorkerId) -> None:
        state = self._workers.pop(worker, None)
        if state is not None:
            kind = self._kinds[(state.model, state.info.role)]
            kind[:] = [other for other in kind if other is not state]

    def get(self, worker: WorkerId | None, epoch: int | None = None) -> WorkerState | None:
        """The worker, if it is known (in this epoch)."""
        state = None if worker is None else self._workers.get(worker)
        return state if state is not None and epoch in (None, state.info.epoch) else None

    def up(self, worker: WorkerId | None, epoch: int | None = None) -> WorkerState | None:
        """The worker, if it can be talked to."""
        state = self.get(worker, epoch)
        return state if state is not None and state.up else None

    def of(self, model: str, role: Role) -> list[WorkerState]:
        """Workers that can be talked to, by name."""
        return [state for state in self._kinds.get((model, role), ()) if state.up]

    def some(self, model: str, role: Role, limit: int, rng: random.Random) -> list[WorkerState]:
        """All that can be talked to, or about `limit` of them where there are more, drawn at random."""
        kind = self._kinds.get((model, role), [])
        if len(kind) <= limit:
            return self.of(model, role)
        return sorted((s for s in rng.sample(kind, limit) if s.up), key=lambda s: s.id)
