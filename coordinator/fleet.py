"""What the coordinator knows of its workers: who lives, what is placed there, what they said last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coordinator.account import Pace
from coordinator.latency import ASSUMED_TOKENS_PER_S, LatencyModel, Work
from coordinator.links import Links
from coordinator.pairs import PairQuarantine
from coordinator.pool import Pool
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
    role_asked: Role | None = None
    """Which role it was told to take up, while something of the old one may be left on it."""
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
    on_change: Callable[[WorkerId, WorkerState], None] | None = None
    """Told after its load, or whether it takes requests, may have changed."""
    _arriving: set[AttemptId] = field(default_factory=set)
    """Placed here to decode, whose prompts have not been read yet."""
    _tpot_targets: dict[AttemptId, float] = field(default_factory=dict)
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
            # of all ranks together, a head that several hold counted once
            shard.layout.block_bytes * shard.total_heads // (shard.num_heads * shard.layout.block_tokens)
            for shard in self.info.fingerprint.shards
        )

    def takes_decode(self) -> bool:
        return self.up and not self.draining and not self.full and len(self.unanswered) < self.window

    def takes_prompts(self) -> bool:
        return self.up and not self.draining

    def why_not(self) -> str:
        """Why it takes no requests; empty: it does."""
        if not self.up:
            return "its connection is being made again" if self.redialling else "it is down"
        if self.draining:
            return "it is draining"
        if self.info.role is Role.PREFILL:
            return ""
        if self.full:
            return "it had no room for the last one, and nothing has left it since"
        if len(self.unanswered) >= self.window:
            return f"{len(self.unanswered)} offers wait for its answer"
        return ""

    def reserved(self, attempt: AttemptId) -> None:
        self.unanswered.discard(attempt)
        self.window += 1
        self._changed()

    def refused(self) -> None:
        """It has no room: ask again when there may be some, and carefully."""
        self.full, self.window = True, 1

    def place_decode(self, attempt: AttemptId, tokens: int, tpot_target_s: float | None = None) -> None:
        blocks = blocks_for(tokens + 1, self.info.block_tokens)
        self.blocks_placed[attempt] = blocks
        self._blocks_sum += blocks
        self.unanswered.add(attempt)
        self._arriving.add(attempt)
        if tpot_target_s is not None:
            self._tpot_targets[attempt] = tpot_target_s
        self._changed()

    def decodes(self, attempt: AttemptId) -> None:
        """Its prompt has been read: it writes its answer from now on."""
        self._arriving.discard(attempt)
        self._tell_writing()

    def _tell_writing(self) -> None:
        """A prefill worker keeps few answers, and short ones: its steps are known by what runs now, not by
        what ran at its last heartbeat."""
        if self.info.role is Role.PREFILL:
            self.latency.writes(*self.decoding)

    @property
    def num_placed(self) -> int:
        """Attempts that hold a place here, to be read or to be written."""
        return len(self.blocks_placed.keys() | self.prefill_left.keys())

    @property
    def num_decoding(self) -> int:
        """Answers that are being written here, of those that were placed here."""
        return len(self.blocks_placed) - len(self._arriving)

    @property
    def num_arriving(self) -> int:
        """Placed here to decode, and their prompts are not read yet."""
        return len(self._arriving)

    @property
    def has_tpot_targets(self) -> bool:
        return bool(self._tpot_targets)

    @property
    def tpot_targets(self) -> tuple[float, int]:
        """Seconds, the tightest of the answers placed here (infinite without any), and how many have one."""
        targets = self._tpot_targets
        return (min(targets.values()), len(targets)) if targets else (math.inf, 0)

    def place_prefill(self, attempt: AttemptId, tokens: int, due: float = math.inf) -> None:
        """due: when its first token is due; prompts are read in this order."""
        self._due[attempt] = due
        self._latest_due = max(self._latest_due, due)
        self.prefill_left[attempt] = self._prefill_totals[attempt] = tokens
        self._prefill_sum += tokens
        self._pairs_sum += tokens * tokens / 2
        self._changed()

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
        self._changed()

    def release(self, attempt: AttemptId) -> None:
        """The attempt has left this worker, or never got in."""
        self.unanswered.discard(attempt)
        self.prefill_reached(attempt, 0)
        self.latency.prompt_dropped(attempt)
        self._arriving.discard(attempt)
        self._tpot_targets.pop(attempt, None)
        blocks = self.blocks_placed.pop(attempt, None)
        if blocks is not None:
            self._blocks_sum -= blocks
            self._tell_writing()
            self.room_may_have_appeared()

    def room_may_have_appeared(self) -> None:
        self.full = False
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self.info.worker, self)

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
        else:
            self.latency.heard(self._as_writer(beat), reads=True)
        self.room_may_have_appeared()

    def _as_writer(self, beat: Heartbeat) -> Heartbeat:
        """Of a prefill worker, with the answers that it keeps: its own figures are about prompts."""
        seqs, context = self.decoding
        return dataclasses.replace(beat, running=seqs, waiting_tokens=context)

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

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences and context tokens of its steps, as far as is known, with those about to join."""
        seqs, context = len(self.blocks_placed), self._blocks_sum * self.info.block_tokens
        beat = self.heartbeat
        if beat is not None and self.info.role is Role.DECODE:
            seqs, context = max(seqs, beat.running), max(context, beat.waiting_tokens)
        return seqs, context

    @property
    def decoding(self) -> tuple[int, int]:
        """The part of `batch` whose prompts have been read."""
        seqs, context = self.batch
        seqs = max(seqs - len(self._arriving), 0)
        return seqs, context * seqs // max(len(self.blocks_placed), seqs, 1)

    def batch_with(self, tokens: int) -> tuple[int, int]:
        """`batch` once `tokens` more have joined."""
        seqs, context = self.batch
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
        self._pools: dict[tuple[str, Role], Pool] = {}
        self.pairs = PairQuarantine()
        self.links = Links()

    def __iter__(self) -> Iterator[WorkerState]:
        return iter(self._workers.values())

    def add(self, state: WorkerState) -> None:
        self.forget(state.id)
        self._workers[state.id] = state
        self.pool(state.model, state.info.role).add(state)

    def forget(self, worker: WorkerId) -> None:
        state = self._workers.pop(worker, None)
        self.pairs.forget(worker)
        self.links.forget(worker)
        if state is not None:
            self.pool(state.model, state.info.role).forget(state)

    def change_role(self, state: WorkerState, role: Role) -> None:
        """It counts among the workers of another role from now on. What it has learned of both, it keeps."""
        self.pool(state.model, state.info.role).forget(state)
        state.info = dataclasses.replace(state.info, role=role)
        state.full, state.window = False, state.info.max_num_seqs
        self.pool(state.model, role).add(state)

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
        return self.pool(model, role).up()

    def pool(self, model: str, role: Role) -> Pool:
        pool = self._pools.get((model, role))
        if pool is None:
            load = _batch_load if role is Role.DECODE else _queue_load
            pool = self._pools[(model, role)] = Pool(load)
        return pool


def _batch_load(state: WorkerState) -> float:
    return state.decode_load(0)


def _queue_load(state: WorkerState) -> float:
    return state.prefill_wait_s(0)
