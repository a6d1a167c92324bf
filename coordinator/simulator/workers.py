"""Workers as the coordinator sees them: the protocol is spoken in full, computing takes the profile's time.

A decode worker's steps are not simulated one by one: between two changes of its batch they follow from a
quadratic equation (every step is longer than the one before by what the batch has written).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.simulator.profile import Profile
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import (
    BlockCounts,
    Cancel,
    Down,
    FinishReason,
    Heartbeat,
    KvArrived,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    RefusalReason,
    Refused,
    RequestSpec,
    Reserved,
    StartDecode,
    StartPrefill,
    Tokens,
    TransferDone,
    Up,
    WorkerInfo,
)


class Ports(Protocol):
    """What a modelled worker can do to the world. Its own death undoes what it scheduled."""

    def later(self, worker: Worker, delay_s: float, act: Callable[[float], None]) -> None: ...

    def tell(self, worker: Worker, message: Up, now: float) -> None: ...

    def push(self, worker: Worker, to: WorkerId, attempt: AttemptId, now: float) -> None: ...


class Worker:
    """What both kinds share."""

    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports) -> None:
        self.info, self.profile, self._ports = info, profile, ports
        self.steps = 0.0

    def handle(self, message: Down, now: float) -> None:
        raise NotImplementedError

    def beat(self, now: float) -> Heartbeat:
        raise NotImplementedError

    def died(self, now: float) -> list[Up]:
        """What it had told before it died."""
        return []

    def _heartbeat(self, *, held: int, waiting: int, running: int, tokens: float, step_s: float) -> Heartbeat:
        total = self.info.num_blocks
        counts = BlockCounts(total=total, free=total - held, held=held, cached=0, quarantined=0)
        return Heartbeat(
            worker=self.info.worker,
            epoch=self.info.epoch,
            blocks=counts,
            waiting=waiting,
            running=running,
            waiting_tokens=round(tokens),
            step_s=step_s,
            tokens_per_s=1 / self.profile.prefill_token,
            prefix_hit_tokens=0,
            prefix_query_tokens=0,
            steps=int(self.steps),
        )


def num_new_tokens(spec: RequestSpec) -> int:
    """How long the answer still gets: in a simulation, as long as it may."""
    return max(spec.sampling.max_tokens - spec.num_output_tokens, 1)


@dataclass(slots=True)
class _Prompt:
    spec: RequestSpec
    to: WorkerId | None
    order: tuple[float, int, float, int]
    received: float
    done: int = 0
    compute_s: float = 0.0


@dataclass(slots=True)
class PromptQueue:
    """Prompts in the order of their urgency, read in chunks."""

    waiting: list[tuple[tuple[float, int, float, int], AttemptId]] = field(default_factory=list)
    prompts: dict[AttemptId, _Prompt] = field(default_factory=dict)
    count: int = 0

    def add(self, spec: RequestSpec, to: WorkerId | None, now: float) -> None:
        self.count += 1
        due = math.inf if spec.ttft_deadline is None else spec.ttft_deadline
        prompt = _Prompt(spec, to, (due, spec.priority, spec.arrival, self.count), now)
        self.prompts[spec.attempt] = prompt
        heapq.heappush(self.waiting, (prompt.order, spec.attempt))

    def chunk(self, budget: int) -> list[tuple[_Prompt, int, int]]:
        """(prompt, start, end) of the next step, most urgent first."""
        taken: list[tuple[_Prompt, int, int]] = []
        back: list[tuple[tuple[float, int, float, int], AttemptId]] = []
        while budget > 0 and self.waiting:
            order, attempt = heapq.heappop(self.waiting)
            prompt = self.prompts.get(attempt)
            if prompt is None or prompt.order != order:
                continue
            end = min(len(prompt.spec.tokens), prompt.done + budget)
            budget -= end - prompt.done
            taken.append((prompt, prompt.done, end))
            back.append((order, attempt))
        for entry in back:
            heapq.heappush(self.waiting, entry)
        return taken


def _work(chunks: list[tuple[_Prompt, int, int]]) -> tuple[int, float]:
    tokens = sum(end - start for _, start, end in chunks)
    return tokens, sum((end * end - start * start) / 2 for _, start, end in chunks)


class PrefillWorker(Worker):
    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports) -> None:
        super().__init__(info, profile, ports)
        self._queue = PromptQueue()
        self._busy = False

    def handle(self, message: Down, now: float) -> None:
        match message:
            case StartPrefill(spec=spec, decode_worker=to):
                self._queue.add(spec, to, now)
                if not self._busy:
                    self._step(now)
            case Cancel(attempt=attempt):
                self._queue.prompts.pop(attempt, None)
                self._ports.tell(self, PushesSettled(attempt=attempt), now)
            case _:
                pass

    def _step(self, now: float) -> None:
        chunks = self._queue.chunk(self.profile.chunk_tokens)
        self._busy = bool(chunks)
        if not chunks:
            return
        for prompt, start, _ in chunks:
            if start == 0:
                started = PrefillStarted(
                    attempt=prompt.spec.attempt, cached_tokens=0, queue_s=now - prompt.received
                )
                self._ports.tell(self, started, now)
        seconds = self.profile.prefill_s(*_work(chunks))
        self._ports.later(self, seconds, lambda at: self._done(chunks, seconds, at))

    def _done(self, chunks: list[tuple[_Prompt, int, int]], seconds: float, now: float) -> None:
        self.steps += 1
        for prompt, start, end in chunks:
            attempt = prompt.spec.attempt
            if self._queue.prompts.get(attempt) is not prompt:
                continue  # cancelled meanwhile
            prompt.done = end
            prompt.compute_s += seconds
            if end < len(prompt.spec.tokens):
                self._ports.tell(self, PrefillProgress(attempt=attempt, tokens_done=end), now)
                continue
            del self._queue.prompts[attempt]
            last = num_new_tokens(prompt.spec) == 1
            self._ports.tell(self, prefill_done(prompt, last), now)
            if last:
                self._ports.tell(self, PushesSettled(attempt=attempt), now)
            else:
                self._transfer(prompt, end - start)
        self._step(now)

    def _transfer(self, prompt: _Prompt, last_chunk: int) -> None:
        """Earlier chunks went while later ones were computed; the last one is left to wait for."""
        profile, attempt, to = self.profile, prompt.spec.attempt, prompt.to
        size = len(prompt.spec.tokens) * profile.kv_token_bytes
        exposed_s = profile.transfer_latency + (
            last_chunk * profile.kv_token_bytes / profile.transfer_bytes_per_s
        )
        done = TransferDone(
            attempt=attempt,
            bytes_moved=size,
            exposed_s=exposed_s,
            busy_s=size / profile.transfer_bytes_per_s,
            path="modelled",
        )

        def arrived(now: float) -> None:
            if to is not None:
                self._ports.push(self, to, attempt, now)
            self._ports.tell(self, done, now)

        self._ports.later(self, exposed_s, arrived)

    def beat(self, now: float) -> Heartbeat:
        left = sum(len(p.spec.tokens) - p.done for p in self._queue.prompts.values())
        waiting = len(self._queue.prompts)
        return self._heartbeat(held=0, waiting=waiting, running=int(self._busy), tokens=left, step_s=0.0)


def prefill_done(prompt: _Prompt, last: bool) -> PrefillDone:
    return PrefillDone(
        attempt=prompt.spec.attempt,
        token=0,
        logprobs=None,
        prompt_logprobs=[],
        finish_reason=FinishReason.LENGTH if last else None,
        compute_s=prompt.compute_s,
    )


@dataclass(slots=True)
class _Answer:
    spec: RequestSpec
    blocks: int
    began: float = -1.0
    """Steps done when it joined the batch; below 0 before that."""


class DecodeWorker(Worker):
    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports) -> None:
        super().__init__(info, profile, ports)
        self._answers: dict[AttemptId, _Answer] = {}
        self._ends: list[tuple[float, int, AttemptId]] = []
        self._queue = PromptQueue()
        self._held = 0
        self._running = 0
        self._context = 0.0
        self._at = 0.0
        self._version = 0
        self._order = 0
        self._reading = False
        self._step_s = 0.0

    def handle(self, message: Down, now: float) -> None:
        match message:
            case StartDecode():
                self._start(message, now)
            case Cancel(attempt=attempt):
                self._advance(now)
                self._queue.prompts.pop(attempt, None)
                self._leave(attempt)
                self._schedule()
            case _:
                pass

    def _start(self, message: StartDecode, now: float) -> None:
        spec, attempt = message.spec, message.spec.attempt
        # Room for the whole answer: preemption is not modelled.
        wanted = blocks_for(len(spec.tokens) + num_new_tokens(spec), self.info.block_tokens)
        reason = None
        if len(self._answers) >= self.info.max_num_seqs:
            reason = RefusalReason.BATCH_FULL
        elif self._held + wanted > self.info.num_blocks:
            reason = RefusalReason.NO_BLOCKS
        if reason is not None:
            self._ports.tell(self, Refused(attempt=attempt, reason=reason, detail=""), now)
            return
        self._held += wanted
        self._answers[attempt] = _Answer(spec, wanted)
        blocks = [BlockId(0)] * blocks_for(len(spec.tokens), self.info.block_tokens)
        self._ports.tell(self, Reserved(attempt=attempt, blocks=blocks, cached_tokens=0), now)
        if message.prefill_worker is None:
            self._queue.add(spec, None, now)
            if not self._reading:
                self._advance(now)
                self._read(now)

    # --- the batch ------------------------------------------------------------------------------------

    def landed(self, attempt: AttemptId, now: float) -> None:
        """The last push has arrived."""
        answer = self._answers.get(attempt)
        if answer is None:
            return
        self._advance(now)
        self._ports.tell(self, KvArrived(attempt=attempt), now)
        self._join(attempt, answer)
        self._schedule()

    def _join(self, attempt: AttemptId, answer: _Answer) -> None:
        answer.began = self.steps
        self._running += 1
        self._context += len(answer.spec.tokens) + 1
        self._order += 1
        heapq.heappush(self._ends, (self.steps + num_new_tokens(answer.spec) - 1, self._order, attempt))

    def _leave(self, attempt: AttemptId) -> None:
        answer = self._answers.pop(attempt, None)
        if answer is None:
            return
        self._held -= answer.blocks
        if answer.began >= 0:
            self._running -= 1
            self._context -= len(answer.spec.tokens) + 1 + self.steps - answer.began

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
        self._finish_due(now)
        self._schedule()

    def _finish_due(self, now: float) -> None:
        while self._ends and (self._ends[0][0] <= self.steps + 1e-6 or self._ends[0][2] not in self._answers):
            _, _, attempt = heapq.heappop(self._ends)
            answer = self._answers.get(attempt)
            if answer is not None:
                tokens = _told(answer, num_new_tokens(answer.spec) - 1, FinishReason.LENGTH)
                self._leave(attempt)
                self._ports.tell(self, tokens, now)

    # --- prompts read here ----------------------------------------------------------------------------

    def _read(self, now: float) -> None:
        """A step of the whole batch with a chunk of prompts in it."""
        chunks = self._queue.chunk(self.profile.colocated_chunk_tokens)
        was, self._reading = self._reading, bool(chunks)
        if not chunks:
            if was:
                self._at = now
                self._schedule()
            return
        self._version += 1
        seconds = self.profile.prefill_s(*_work(chunks))
        if self._running:
            seconds += self.profile.step_s(self._running, self._context)
        self._step_s = seconds
        self._ports.later(self, seconds, lambda at: self._read_done(chunks, seconds, at))

    def _read_done(self, chunks: list[tuple[_Prompt, int, int]], seconds: float, now: float) -> None:
        self.steps += 1
        self._context += self._running
        self._at = now
        self._finish_due(now)
        for prompt, _, end in chunks:
            attempt = prompt.spec.attempt
            answer = self._answers.get(attempt)
            if answer is None or self._queue.prompts.get(attempt) is not prompt:
                continue
            prompt.done = end
            prompt.compute_s += seconds
            if end < len(prompt.spec.tokens):
                self._ports.tell(self, PrefillProgress(attempt=attempt, tokens_done=end), now)
                continue
            del self._queue.prompts[attempt]
            last = num_new_tokens(prompt.spec) == 1
            self._ports.tell(self, prefill_done(prompt, last), now)
            if last:
                self._leave(attempt)
            else:
                self._join(attempt, answer)
        self._read(now)

    def died(self, now: float) -> list[Up]:
        self._advance(now)
        told: list[Up] = []
        for answer in self._answers.values():
            count = min(int(self.steps - answer.began), num_new_tokens(answer.spec) - 2)
            if answer.began >= 0 and count > 0:
                told.append(_told(answer, count, None))
        return told

    def beat(self, now: float) -> Heartbeat:
        self._advance(now)
        waiting = len(self._answers) - self._running
        return self._heartbeat(
            held=self._held, waiting=waiting, running=self._running, tokens=self._context, step_s=self._step_s
        )


def _told(answer: _Answer, count: int, reason: FinishReason | None) -> Tokens:
    """The tokens after the first, in one message: only when the last one comes is measured."""
    first = answer.spec.num_output_tokens + 1
    return Tokens(attempt=answer.spec.attempt, first_index=first, tokens=[0] * count, finish_reason=reason)
