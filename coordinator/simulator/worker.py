"""A modelled worker of either role: it speaks the protocol in full, and takes a profile's time.

As in the product, one worker does both: a prefill worker may keep an answer and write it, a decode worker
may read a prompt. Prompts are read in chunks, each of which is pushed while the next is computed. A step that
reads while answers are written is one event: a chunk of prompts, and a token for every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from coordinator.simulator.batch import Batch
from coordinator.simulator.prefix_cache import BlockKeys, PrefixCache
from coordinator.simulator.profile import Profile
from coordinator.simulator.prompts import Chunk, Prompt, PromptQueue, work
from pdserve.core.errors import ErrorCode
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import (
    AttemptFailed,
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
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    PushPrefix,
    ReceivePrefix,
    RefusalReason,
    Refused,
    RequestSpec,
    Reserved,
    Role,
    SendPrefixes,
    StartDecode,
    StartPrefill,
    TransferDone,
    Up,
    WorkerInfo,
)
from pdserve.core.worker_state import BlockCounts, PairState, PrefixEvents

_PATH: Final = "modelled"


class Ports(Protocol):
    """What a modelled worker can do to the world. Its own death undoes what it scheduled."""

    def later(self, worker: Worker, delay_s: float, act: Callable[[float], None]) -> None: ...

    def tell(self, worker: Worker, messages: Sequence[Up], now: float) -> None:
        """One frame to the coordinator."""
        ...

    def push(
        self, worker: Worker, to: WorkerId, attempt: AttemptId, now: float, *, written: int | None
    ) -> None:
        """The last of an attempt's KV has landed. written: tokens of an answer that moves, for it to go on
        after; None: it begins there."""
        ...


class Worker:
    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports, keys: BlockKeys) -> None:
        self.info, self.profile, self._ports = info, profile, ports
        self.draining = False
        self._links: Final = [
            # All pairs are alike: one stands for them.
            PairState(
                peer=info.worker,
                path=_PATH,
                bytes_per_s=profile.transfer_bytes_per_s,
                latency_s=profile.transfer_latency,
            )
        ]
        self._batch = Batch(profile)
        self._queue = PromptQueue()
        self._cache = PrefixCache(keys)
        self._sequence = -1
        self._receiving: dict[AttemptId, list[int]] = {}
        """Beginnings of prompts that peers push here, as tokens."""
        self._pushing = 0
        self._stepping = False
        """A step that reads is under way."""
        self._plan = 0
        """Counts the changes to what its answers will do: an end that was planned before one is void."""

    @property
    def empty(self) -> bool:
        """Nothing is left here of any request."""
        return not (self._batch.answers or self._queue.prompts or self._pushing)

    def handle(self, message: Down, now: float) -> None:
        match message:
            case StartDecode():
                self._start_decode(message, now)
            case StartPrefill(spec=spec, decode_worker=to, dst_cached_tokens=there):
                cached = self._cache.ask(spec.tokens)
                self._queue.add(spec, to, now, cached=cached, there=there)
                self._read(now)
            case Cancel(attempt=attempt):
                self._cancel(attempt, now)
            case Migrate():
                self._migrate(message, now)
            case Preempt(attempt=attempt):
                self._preempt(attempt, now)
            case ReceivePrefix():
                self._receive_prefix(message, now)
            case PushPrefix():
                self._push_prefix(message, now)
            case SendPrefixes():
                self._ports.tell(self, [self._snapshot()], now)
            case Drain() | ChangeRole():
                self.draining = True
            case _:
                pass

    def died(self, now: float) -> list[Up]:
        """What it had told before it died."""
        self._advance(now)
        batch = self._batch
        running = [(answer, batch.written(answer)) for answer in batch.answers.values()]
        return [answer.tokens(count) for answer, count in running if count]

    def beat(self, now: float) -> Heartbeat:
        self._advance(now)
        batch, total, decodes = self._batch, self.info.num_blocks, self.info.role is Role.DECODE
        return Heartbeat(
            worker=self.info.worker,
            epoch=self.info.epoch,
            blocks=BlockCounts(
                total=total, free=total - batch.held, held=batch.held, cached=0, quarantined=0
            ),
            waiting=len(batch.answers) - batch.running if decodes else len(self._queue.prompts),
            running=batch.running if decodes else int(self._stepping),
            waiting_tokens=round(batch.context if decodes else self._queue.tokens_left),
            step_s=batch.last_step_s,
            tokens_per_s=1 / self.profile.prefill_token,
            prefix_hit_tokens=self._cache.hit_tokens,
            prefix_query_tokens=self._cache.query_tokens,
            steps=int(batch.steps),
            busy_s=batch.busy_s,
            draining=self.draining,
            pairs=self._links,
        )

    # --- answers --------------------------------------------------------------------------------------

    def _start_decode(self, message: StartDecode, now: float) -> None:
        spec, attempt, batch = message.spec, message.spec.attempt, self._batch
        # Room for the whole answer: that a worker preempts of its own accord is not modelled.
        wanted = blocks_for(len(spec.tokens) + num_new_tokens(spec), self.info.block_tokens)
        reason = None
        if self.draining:
            reason = RefusalReason.DRAINING
        elif len(batch.answers) >= self.info.max_num_seqs:
            reason = RefusalReason.BATCH_FULL
        elif batch.held + wanted > self.info.num_blocks:
            reason = RefusalReason.NO_BLOCKS
        if reason is not None:
            self._ports.tell(self, [Refused(attempt=attempt, reason=reason, detail="")], now)
            return
        batch.reserve(spec, wanted)
        cached = self._cache.ask(spec.tokens)
        blocks = self._blocks_for(len(spec.tokens))
        self._ports.tell(self, [Reserved(attempt=attempt, blocks=blocks, cached_tokens=cached)], now)
        if message.prefill_worker is None:
            self._queue.add(spec, None, now, cached=cached)
            self._read(now)

    def landed(self, attempt: AttemptId, now: float, *, written: int | None) -> None:
        """The last push has arrived. written: tokens of an answer that was written elsewhere so far."""
        answer, prefix = self._batch.answers.get(attempt), self._receiving.pop(attempt, None)
        told: list[Up] = [KvArrived(attempt=attempt)]
        if prefix is not None:
            self._remember(prefix, told)
        elif answer is not None:
            if written is not None:
                answer.written = written
            self._advance(now)
            self._remember(answer.spec.tokens, told)
            self._batch.join(answer)
            self._schedule()
        else:
            return
        self._ports.tell(self, told, now)

    def _cancel(self, attempt: AttemptId, now: float) -> None:
        self._advance(now)
        self._queue.discard(attempt)
        self._receiving.pop(attempt, None)
        if attempt in self._batch.answers:
            self._batch.leave(attempt)
        elif self.info.role is Role.PREFILL:
            self._ports.tell(self, [PushesSettled(attempt=attempt)], now)
        self._schedule()

    def _advance(self, now: float) -> None:
        if not self._stepping:
            self._batch.advance(now)

    def _schedule(self) -> None:
        """When the next answer is complete, as far as is known now."""
        self._plan += 1
        wait_s = None if self._stepping else self._batch.next_end_s()
        if wait_s is not None:
            plan = self._plan
            self._ports.later(self, wait_s, lambda at: self._end(at) if plan == self._plan else None)

    def _end(self, now: float) -> None:
        self._advance(now)
        told = self._batch.complete()
        if told:
            self._ports.tell(self, told, now)
        self._schedule()

    def _preempt(self, attempt: AttemptId, now: float) -> None:
        """What it has written is told, and its room is free."""
        answer = self._batch.answers.get(attempt)
        if answer is None or answer.began < 0:
            return
        self._advance(now)
        count = self._batch.written(answer)
        told: list[Up] = [answer.tokens(count)] if count else []
        self._batch.leave(attempt)
        self._ports.tell(self, [*told, Preempted(attempt=attempt)], now)
        self._schedule()

    def _migrate(self, order: Migrate, now: float) -> None:
        """Its KV goes while it runs on; what it has written by then is told, and it runs there."""
        answer = self._batch.answers.get(order.attempt)
        done = self._transfer(order.to, 0.0 if answer is None else answer.context)

        def pushed(at: float) -> None:
            self._advance(at)
            if answer is None or self._batch.answers.get(order.attempt) is not answer or answer.began < 0:
                self._ports.tell(self, [PushesSettled(attempt=order.to)], at)
                return
            count = self._batch.written(answer)
            told: list[Up] = [answer.tokens(count)] if count else []
            self._ports.tell(self, [*told, done], at)
            self._batch.leave(order.attempt)
            self._schedule()
            self._ports.push(self, order.decode_worker, order.to, at, written=answer.written + count)

        self._ports.later(self, self.profile.transfer_latency + done.busy_s, pushed)

    # --- prompts --------------------------------------------------------------------------------------

    def _read(self, now: float) -> None:
        """There is something to read: begin, unless a step is under way."""
        if not self._stepping:
            self._advance(now)
            self._step(now, [])

    def _step(self, now: float, told: list[Up]) -> None:
        """Begin one that reads, and say what has been `told` so far and what begins."""
        batch, profile = self._batch, self.profile
        budget = profile.chunk_tokens
        if batch.answers:
            budget = max(profile.colocated_chunk_tokens - batch.running, 1)
        chunks = self._queue.chunks(budget)
        was, self._stepping = self._stepping, bool(chunks)
        for chunk in chunks:
            prompt = chunk.prompt
            if prompt.to is not None and prompt.compute_s == 0:
                attempt, queue_s = prompt.spec.attempt, now - prompt.received
                told.append(PrefillStarted(attempt=attempt, cached_tokens=chunk.start, queue_s=queue_s))
        if told:
            self._ports.tell(self, told, now)
        if chunks:
            self._plan += 1
            seconds = profile.mixed_s(*work(chunks), batch.running, batch.context)
            self._ports.later(self, seconds, lambda at: self._stepped(chunks, seconds, at))
        elif was:
            self._schedule()

    def _stepped(self, chunks: list[Chunk], seconds: float, now: float) -> None:
        self._batch.stepped(seconds, now)
        told: list[Up] = [*self._batch.complete()]
        for chunk in chunks:
            prompt = chunk.prompt
            spec, attempt = prompt.spec, prompt.spec.attempt
            if not self._queue.reached(chunk, seconds):
                continue  # cancelled meanwhile
            if chunk.end < len(spec.tokens):
                told.append(PrefillProgress(attempt=attempt, tokens_done=chunk.end))
                continue
            self._remember(spec.tokens, told)
            told.append(_prefill_done(spec, prompt.compute_s))
            if prompt.to is not None:
                self._hand_over(prompt, chunk.end - chunk.start, told)
            elif num_new_tokens(spec) == 1:
                self._batch.leave(attempt)
            elif attempt in self._batch.answers:
                self._batch.join(self._batch.answers[attempt])
        self._step(now, told)

    def _hand_over(self, prompt: Prompt, last_chunk: int, told: list[Up]) -> None:
        """Earlier chunks went while later ones were computed; the last one is left to wait for."""
        attempt, to = prompt.spec.attempt, prompt.to
        if to is None or num_new_tokens(prompt.spec) == 1:
            told.append(PushesSettled(attempt=attempt))
            return
        moved = max(len(prompt.spec.tokens) - prompt.there, 0)
        self._push(self._transfer(attempt, moved, left=min(last_chunk, moved)), to)

    # --- beginnings of prompts ------------------------------------------------------------------------

    def _receive_prefix(self, message: ReceivePrefix, now: float) -> None:
        tokens, attempt = message.tokens, message.attempt
        cached = self._cache.has(tokens, len(tokens))
        if cached < len(tokens):
            self._receiving[attempt] = tokens
        reserved = Reserved(attempt=attempt, blocks=self._blocks_for(len(tokens)), cached_tokens=cached)
        self._ports.tell(self, [reserved], now)

    def _push_prefix(self, message: PushPrefix, now: float) -> None:
        attempt = message.attempt
        missing = self._cache.has(message.tokens, len(message.tokens)) - message.dst_cached_tokens
        if missing > 0:
            self._push(self._transfer(attempt, missing), message.worker)
            return
        why = AttemptFailed(
            attempt=attempt,
            code=ErrorCode.NOT_FOUND,
            message="nothing of it is cached any more",
            retryable=True,
        )
        self._ports.tell(self, [why, PushesSettled(attempt=attempt)], now)

    def _remember(self, tokens: list[int], told: list[Up]) -> None:
        """Its KV is here, for others that begin alike: the coordinator is told before anything else."""
        cache = self._cache
        cache.add(tokens, (self.info.num_blocks - self._batch.held) * self.info.block_tokens)
        if not (cache.stored or cache.evicted):
            return
        if self._sequence < 0:
            told.insert(0, self._snapshot())
            return
        self._sequence += 1
        told.insert(0, self._events(b"".join(cache.stored), b"".join(cache.evicted), snapshot=False))

    def _snapshot(self) -> PrefixEvents:
        self._sequence = max(self._sequence, 0)
        return self._events(self._cache.held(), b"", snapshot=True)

    def _events(self, stored: bytes, evicted: bytes, *, snapshot: bool) -> PrefixEvents:
        self._cache.stored, self._cache.evicted = [], []
        return PrefixEvents(
            worker=self.info.worker,
            epoch=self.info.epoch,
            sequence=self._sequence,
            stored=stored,
            evicted=evicted,
            snapshot=snapshot,
        )

    # --- transfers ------------------------------------------------------------------------------------

    def _transfer(self, attempt: AttemptId, tokens: float, *, left: float | None = None) -> TransferDone:
        """Of so many tokens' KV, of which `left` are still to go; None: all."""
        profile = self.profile
        size, last = (
            round(count * profile.kv_token_bytes) for count in (tokens, tokens if left is None else left)
        )
        return TransferDone(
            attempt=attempt,
            bytes_moved=size,
            exposed_s=profile.transfer_latency + last / profile.transfer_bytes_per_s,
            busy_s=size / profile.transfer_bytes_per_s,
            path=_PATH,
        )

    def _push(self, done: TransferDone, to: WorkerId) -> None:
        self._pushing += 1

        def arrived(now: float) -> None:
            self._pushing -= 1
            self._ports.push(self, to, done.attempt, now, written=None)
            self._ports.tell(self, [done], now)

        self._ports.later(self, done.exposed_s, arrived)

    def _blocks_for(self, tokens: int) -> list[BlockId]:
        return [BlockId(0)] * blocks_for(tokens, self.info.block_tokens)


def num_new_tokens(spec: RequestSpec) -> int:
    """How long the answer still gets: in a simulation, as long as it may."""
    return max(spec.sampling.max_tokens - spec.num_output_tokens, 1)


def _prefill_done(spec: RequestSpec, compute_s: float) -> PrefillDone:
    return PrefillDone(
        attempt=spec.attempt,
        token=0,
        logprobs=None,
        prompt_logprobs=[],
        finish_reason=FinishReason.LENGTH if num_new_tokens(spec) == 1 else None,
        compute_s=compute_s,
    )
