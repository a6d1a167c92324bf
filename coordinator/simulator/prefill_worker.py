"""A modelled prefill worker: reads prompts in chunks and pushes each chunk while it computes the next."""

from __future__ import annotations

from coordinator.simulator.profile import Profile
from coordinator.simulator.prompts import Chunk, PrefixCache, Prompt, PromptQueue, work
from coordinator.simulator.worker import Ports, Worker, num_new_tokens, prefill_done
from pdserve.core.messages import (
    Cancel,
    ChangeRole,
    Down,
    Drain,
    Heartbeat,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    StartPrefill,
    TransferDone,
    Up,
    WorkerInfo,
)


class PrefillWorker(Worker):
    def __init__(self, info: WorkerInfo, profile: Profile, ports: Ports) -> None:
        super().__init__(info, profile, ports)
        self._queue = PromptQueue()
        self._cache = PrefixCache(profile.num_blocks * profile.block_tokens)
        self._busy = False
        self._pushing = 0

    @property
    def empty(self) -> bool:
        return not self._queue.prompts and not self._pushing

    def handle(self, message: Down, now: float) -> None:
        match message:
            case StartPrefill(spec=spec, decode_worker=to):
                self._queue.add(spec, to, now, cached=self._cache.match(spec.tokens))
                if not self._busy:
                    self._step(now, [])
            case Cancel(attempt=attempt):
                self._queue.discard(attempt)
                self._ports.tell(self, [PushesSettled(attempt=attempt)], now)
            case Drain() | ChangeRole():
                self.draining = True
            case _:
                pass

    def _step(self, now: float, told: list[Up]) -> None:
        """Begin one, and say what has been `told` so far and what begins."""
        chunks = self._queue.chunks(self.profile.chunk_tokens)
        self._busy = bool(chunks)
        for chunk in chunks:
            prompt = chunk.prompt
            if prompt.compute_s == 0:
                queue_s = now - prompt.received
                started = PrefillStarted(
                    attempt=prompt.spec.attempt, cached_tokens=chunk.start, queue_s=queue_s
                )
                told.append(started)
        if told:
            self._ports.tell(self, told, now)
        if chunks:
            seconds = self.profile.prefill_s(*work(chunks))
            self._ports.later(self, seconds, lambda at: self._done(chunks, seconds, at))

    def _done(self, chunks: list[Chunk], seconds: float, now: float) -> None:
        self.steps += 1
        told: list[Up] = []
        for chunk in chunks:
            prompt = chunk.prompt
            if not self._queue.reached(chunk, seconds):
                continue  # cancelled meanwhile
            spec = prompt.spec
            if chunk.end < len(spec.tokens):
                told.append(PrefillProgress(attempt=spec.attempt, tokens_done=chunk.end))
                continue
            self._cache.add(spec.tokens)
            told.append(prefill_done(spec, prompt.compute_s))
            if num_new_tokens(spec) == 1:
                told.append(PushesSettled(attempt=spec.attempt))
            else:
                self._transfer(prompt, chunk.end - chunk.start)
        self._step(now, told)

    def _transfer(self, prompt: Prompt, last_chunk: int) -> None:
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
        self._pushing += 1

        def arrived(now: float) -> None:
            self._pushing -= 1
            if to is not None:
                self._ports.push(self, to, attempt, now, written=None)
            self._ports.tell(self, [done], now)

        self._ports.later(self, exposed_s, arrived)

    def beat(self, now: float) -> Heartbeat:
        return self._heartbeat(
            held=0,
            waiting=len(self._queue.prompts),
            running=int(self._busy),
            tokens=self._queue.tokens_left,
            step_s=0.0,
            hits=(self._cache.hit_tokens, self._cache.query_tokens),
        )
