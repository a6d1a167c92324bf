"""A modelled decode worker.

Its steps are not simulated one by one: between two changes of its batch they follow from a quadratic equation
(every step is longer than the one before by what the batch has written). While it also reads prompts, each
step is one event: a chunk of prompts and a token for every sequence.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from coordinator.simulator.profile import Profile
from coordinator.simulator.prompts import Chunk, PrefixCache, PromptQueue, work
from coordinator.simulator.worker import Ports, Worker, num_new_tokens, prefill_done
from pdserve.core.ids import AttemptId, BlockId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import (
    Cancel,
    ChangeRole,
    Down,
    Drain,
    FinishReason,
    Heartbeat,
    KvArrived,
    Migrate,
    Preempt,
    Preempted,
    PrefillProgress,
    PushesSettled,
    RefusalReason,
    Refused,
    RequestSpec,
    Reserved,
    StartDecode,
    Tokens,
    TransferDone,
    Up,
    WorkerInfo,
)


@dataclass(slots=True)
class _Answer:
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


class DecodeWorker(Worker):
    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports) -> None:
        super().__init__(info, profile, ports)
        self._answers: dict[AttemptId, _Answer] = {}
        self._ends: list[tuple[float, int, AttemptId]] = []
        self._queue = PromptQueue()
        self._cache = PrefixCache(profile.num_blocks * profile.block_tokens)
        self._held = 0
        self._running = 0
        self._context = 0.0
        self._at = 0.0
        self._version = 0
        self._order = 0
        self._reading = False
        self._step_s = 0.0

    @property
    def empty(self) -> bool:
        return not self._answers

    def handle(self, message: Down, now: float) -> None:
        match message:
            case StartDecode():
                self._start(message, now)
            case Cancel(attempt=attempt):
                self._advance(now)
                self._queue.discard(attempt)
                self._leave(attempt)
                self._schedule()
            case Migrate():
                self._migrate(message, now)
            case Preempt(attempt=attempt):
                self._preempt(attempt, now)
            case Drain() | ChangeRole():
                self.draining = True
            case _:
                pass

    def _start(self, message: StartDecode, now: float) -> None:
        spec, attempt = message.spec, message.spec.attempt
        # Room for the whole answer: that a worker preempts of its own accord is not modelled.
        wanted = blocks_for(len(spec.tokens) + num_new_tokens(spec), self.info.block_tokens)
        reason = None
        if self.draining:
            reason = RefusalReason.DRAINING
        elif len(self._answers) >= self.info.max_num_seqs:
            reason = RefusalReason.BATCH_FULL
        elif self._held + wanted > self.info.num_blocks:
            reason = RefusalReason.NO_BLOCKS
        if reason is not None:
            self._ports.tell(self, [Refused(attempt=attempt, reason=reason, detail="")], now)
            return
        self._held += wanted
        self._answers[attempt] = _Answer(spec, wanted, spec.num_output_tokens + 1)
        blocks = [BlockId(0)] * blocks_for(len(spec.tokens), self.info.block_tokens)
        reads = message.prefill_worker is None
        cached = self._cache.match(spec.tokens) if reads else 0
        self._ports.tell(self, [Reserved(attempt=attempt, blocks=blocks, cached_tokens=cached)], now)
        if reads:
            self._queue.add(spec, None, now, cached=cached)
            if not self._reading:
                self._advance(now)
                self._read(now)

    # --- the batch ------------------------------------------------------------------------------------

    def landed(self, attempt: AttemptId, now: float, *, written: int | None) -> None:
        """The last push has arrived. written: tokens of an answer that was written elsewhere so far."""
        answer = self._answers.get(attempt)
        if answer is None:
            return
        if written is not None:
            answer.written = written
        self._advance(now)
        self._ports.tell(self, [KvArrived(attempt=attempt)], now)
        self._join(attempt, answer)
        self._schedule()

    def _join(self, attempt: AttemptId, answer: _Answer) -> None:
        answer.began = self.steps
        self._running += 1
        self._context += answer.context
        self._order += 1
        heapq.heappush(self._ends, (self.steps + answer.to_write, self._order, attempt))

    def _leave(self, attempt: AttemptId) -> None:
        answer = self._answers.pop(attempt, None)
        if answer is None:
            return
        self._held -= answer.blocks
        if answer.began >= 0:
            self._running -= 1
            self._context -= answer.context + self.steps - answer.began

    def _seconds(self, steps: float) -> float:
        """For this many more steps of the batch as it is."""
        growth = self.profile.decode_context * self._running
        return steps * self.profile.step_s(self._running, self._context) + growth * steps * steps / 2

    def _advance(self, now: float) -> None:
        """Steps since the last change. While prompts are read here, steps are taken one by one instead."""
        elapsed, self._at = now - self._at, now
        if self._reading or not self._running or elapsed <= 0:
            return
        first = self.profile.step_s(self._running, self._context)
        growth = self.profile.decode_context * self._running
        steps = 2 * elapsed / (first + math.sqrt(first * first + 2 * growth * elapsed))
        self.steps += steps
        self._context += self._running * steps
        self._step_s = first

    def _schedule(self) -> None:
        self._version += 1
        while self._ends and self._ends[0][2] not in self._answers:
            heapq.heappop(self._ends)
        if self._reading or not self._ends:
            return
        version = self._version
        wait_s = self._seconds(max(self._ends[0][0] - self.steps, 0.0))
        self._ports.later(self, wait_s, lambda at: self._end(at) if version == self._version else None)

    def _end(self, now: float) -> None:
        self._advance(now)
        told: list[Up] = []
        self._finish_due(told)
        if told:
            self._ports.tell(self, told, now)
        self._schedule()

    def _finish_due(self, told: list[Up]) -> None:
        while self._ends and (self._ends[0][0] <= self.steps + 1e-6 or self._ends[0][2] not in self._answers):
            _, _, attempt = heapq.heappop(self._ends)
            answer = self._answers.get(attempt)
            if answer is not None:
                told.append(_tokens(answer, answer.to_write, FinishReason.LENGTH))
                self._leave(attempt)

    def _num_written(self, answer: _Answer) -> int:
        """Here, so far; never the last one, which ends it."""
        return min(int(self.steps - answer.began), answer.to_write - 1) if answer.began >= 0 else 0

    def _preempt(self, attempt: AttemptId, now: float) -> None:
        """What it has written is told, and its room is free."""
        answer = self._answers.get(attempt)
        if answer is None or answer.began < 0:
            return
        self._advance(now)
        count = max(self._num_written(answer), 0)
        told: list[Up] = [_tokens(answer, count, None)] if count else []
        self._leave(attempt)
        self._ports.tell(self, [*told, Preempted(attempt=attempt)], now)
        self._schedule()

    # --- to another worker ------------------------------------------------------------------------------

    def _migrate(self, order: Migrate, now: float) -> None:
        """Its KV goes while it runs on; what it has written by then is told, and it runs there."""
        answer = self._answers.get(order.attempt)
        size = 0.0 if answer is None else answer.context * self.profile.kv_token_bytes
        busy_s = self.profile.transfer_latency + size / self.profile.transfer_bytes_per_s

        def pushed(at: float) -> None:
            self._advance(at)
            if answer is None or self._answers.get(order.attempt) is not answer or answer.began < 0:
                self._ports.tell(self, [PushesSettled(attempt=order.to)], at)
                return
            count = max(self._num_written(answer), 0)
            done = TransferDone(
                attempt=order.to, bytes_moved=int(size), exposed_s=0.0, busy_s=busy_s, path="modelled"
            )
            told: list[Up] = [_tokens(answer, count, None)] if count else []
            self._ports.tell(self, [*told, done], at)
            self._leave(order.attempt)
            self._schedule()
            self._ports.push(self, order.decode_worker, order.to, at, written=answer.written + count)

        self._ports.later(self, busy_s, pushed)

    # --- prompts read here ----------------------------------------------------------------------------

    def _read(self, now: float) -> None:
        """A step of the whole batch with a chunk of prompts in it."""
        chunks = self._queue.chunks(max(self.profile.colocated_chunk_tokens - self._running, 1))
        was, self._reading = self._reading, bool(chunks)
        if not chunks:
            if was:
                self._at = now
                self._schedule()
            return
        self._version += 1
        seconds = self.profile.mixed_s(*work(chunks), self._running, self._context)
        self._step_s = seconds
        self._ports.later(self, seconds, lambda at: self._read_done(chunks, seconds, at))

    def _read_done(self, chunks: list[Chunk], seconds: float, now: float) -> None:
        self.steps += 1
        self._context += self._running
        self._at = now
        told: list[Up] = []
        self._finish_due(told)
        for chunk in chunks:
            spec = chunk.prompt.spec
            attempt = spec.attempt
            answer = self._answers.get(attempt)
            if not self._queue.reached(chunk, seconds) or answer is None:
                continue
            if chunk.end < len(spec.tokens):
                told.append(PrefillProgress(attempt=attempt, tokens_done=chunk.end))
                continue
            self._cache.add(spec.tokens)
            told.append(prefill_done(spec, chunk.prompt.compute_s))
            if num_new_tokens(spec) == 1:
                self._leave(attempt)
            else:
                self._join(attempt, answer)
        if told:
            self._ports.tell(self, told, now)
        self._read(now)

    def died(self, now: float) -> list[Up]:
        self._advance(now)
        told: list[Up] = []
        for answer in self._answers.values():
            count = self._num_written(answer)
            if count > 0:
                told.append(_tokens(answer, count, None))
        return told

    def beat(self, now: float) -> Heartbeat:
        self._advance(now)
        return self._heartbeat(
            held=self._held,
            waiting=len(self._answers) - self._running,
            running=self._running,
            tokens=self._context,
            step_s=self._step_s,
            hits=(self._cache.hit_tokens, self._cache.query_tokens),
        )


def _tokens(answer: _Answer, count: int, reason: FinishReason | None) -> Tokens:
    """The tokens after the first, in one message: only when the last one comes is measured."""
    return Tokens(
        attempt=answer.spec.attempt,
        first_index=answer.written,
        tokens=[0] * count,
        finish_reason=reason,
    )
