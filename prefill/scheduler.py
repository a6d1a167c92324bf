"""What a worker does next for the prompts it reads for others: pure, no I/O and no clock of its own.

StartPrefill -> WAITING --blocks for the whole prompt--> COMPUTING --first token--> SETTLING -> last word:
                                                                        TransferDone if all went well,
                                                                        else PushesSettled

Events reach it through `pdserve.elastic.scheduler`, which knows what both roles of a worker share.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from kvtransfer.protocol import PushEnded
from pdserve.core.errors import (
    InvalidRequest,
    Overloaded,
    PdServeError,
    PeerLost,
    PromptTooLong,
    RequestCancelled,
    TransferError,
)
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import (
    Cancel,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    Role,
    StartPrefill,
    TransferDone,
)
from pdserve.engine.batch import Sampled, SampleFailed
from pdserve.engine.prefix_cache import PrefixHashes
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Action, MoveTier, OwnerId, Send
from pdserve.worker.failures import AttemptInUse, WrongRole, attempt_failed
from pdserve.worker.finish import finish_reason
from pdserve.worker.last_words import LastWords
from pdserve.worker.meter import StepMeter
from pdserve.worker.pushes import PushBook
from pdserve.worker.shared import Shared
from pdserve.worker.urgency import prefill_urgency
from prefill.queue import PromptQueue
from prefill.run import Chunk, PrefillPlan, PrefillRun, Stage
from prefill.sending import PushMaker


class PrefillScheduler:
    def __init__(self, shared: Shared, *, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._shared, self._layout, self._max_len = shared, shared.layout, shared.max_len
        self._queue = PromptQueue(
            shared.pool,
            shared.cache,
            shared.tiering,
            block_tokens=shared.layout.block_tokens,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            gather_tokens=shared.gather_tokens,
        )
        self._pushes = PushMaker(shared.layout, shared.push_ids)
        self._runs: dict[AttemptId, PrefillRun] = {}
        self._last_words = LastWords()
        self._order = itertools.count()
        self._plan: PrefillPlan | None = None
        self._meter = StepMeter()

    # --- state --------------------------------------------------------------------------------------

    @property
    def attempts(self) -> Collection[AttemptId]:
        """That are here; with pushes under way, also after they ended."""
        return self._runs.keys() | self._last_words.attempts if self._last_words else self._runs.keys()

    @property
    def has_work(self) -> bool:
        """A prompt waits or is being read."""
        return len(self._queue) > 0

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    @property
    def num_computing(self) -> int:
        return self._queue.num_computing

    @property
    def uncomputed_tokens(self) -> int:
        return self._queue.uncomputed_tokens

    # --- messages -----------------------------------------------------------------------------------

    def message(self, owner: OwnerId, message: StartPrefill | Cancel, now: float) -> list[Action]:
        match message:
            case StartPrefill():
                return self._start(owner, message, now)
            case Cancel():
                return self._cancel(owner, message, now)

    def _start(self, owner: OwnerId, request: StartPrefill, now: float) -> list[Action]:
        attempt = request.spec.attempt
        known = self._runs.get(attempt)
        if known is not None:
            said_twice = known.owner == owner
            return [] if said_twice else [Send(owner, attempt_failed(attempt, AttemptInUse(attempt)))]
        error = self._start_error(request)
        if error is not None:
            return _refuse(owner, attempt, error)
        run = PrefillRun(
            owner=owner,
            request=request,
            urgency=prefill_urgency(request.spec, next(self._order)),
            received=now,
            hashes=PrefixHashes(request.spec.cache_salt, self._layout.block_tokens),
            pushes=PushBook(self._shared.pool, attempt),
        )
        self._runs[attempt] = run
        self._queue.add(run)
        return []

    def _start_error(self, request: StartPrefill) -> PdServeError | None:
        num_tokens, size = len(request.spec.tokens), self._layout.block_tokens
        known = self._shared.peers.epoch(request.decode_worker)
        if self._shared.duty.role is not Role.PREFILL:
            return WrongRole(str(self._shared.worker), self._shared.duty.role)
        if self._shared.duty.draining:
            return Overloaded(f"worker {self._shared.worker} is draining")
        if num_tokens > self._max_len:
            return PromptTooLong(prompt_tokens=num_tokens, max_model_len=self._max_len)
        if known != request.decode_epoch:
            found = "not connected" if known is None else f"of epoch {known}"
            return PeerLost(request.decode_worker, f"wanted epoch {request.decode_epoch}, it is {found}")
        if num_tokens == 0 or len(request.dst_blocks) != blocks_for(num_tokens, size):
            limit = f"{blocks_for(num_tokens, size)} blocks for {num_tokens} tokens, at least one"
            return InvalidRequest(field="dst_blocks", value=len(request.dst_blocks), limit=limit)
        if request.dst_cached_tokens % size or not 0 <= request.dst_cached_tokens < num_tokens:
            limit = f"a multiple of {size} in [0, {num_tokens})"
            return InvalidRequest(field="dst_cached_tokens", value=request.dst_cached_tokens, limit=limit)
        return None

    def _cancel(self, owner: OwnerId, message: Cancel, now: float) -> list[Action]:
        run = self._runs.get(message.attempt)
        if run is None and message.attempt in self._last_words:
            self._last_words.ask(message.attempt, owner)
            return []
        if run is None:
            return [Send(owner, PushesSettled(attempt=message.attempt))]
        if run.owner != owner and run.owner_lost:
            # Another coordinator asks when the decode worker's blocks are safe: it hears the last word.
            run.owner, run.owner_lost = owner, False
        if run.owner != owner:
            # It may be its own coordinator, back before the end of its old connection was noticed here.
            run.asked_by.append(owner)
            return [Send(owner, attempt_failed(run.attempt, AttemptInUse(run.attempt)))]
        return self._abandon(run, RequestCancelled(message.reason), now)

    def owner_lost(self, owner: OwnerId, now: float) -> list[Action]:
        lost = RequestCancelled("its coordinator is gone")
        actions: list[Action] = []
        for run in [run for run in self._runs.values() if run.owner == owner]:
            run.owner_lost = True
            if not run.handed_over:
                actions += self._abandon(run, lost, now)
        return actions

    def peer_lost(
        self, peer: WorkerId, error: PdServeError, now: float, up_to_epoch: int | None
    ) -> list[Action]:
        """up_to_epoch: its processes up to that one are gone for certain; None: it failed, and may live."""
        hit = [
            run
            for run in self._runs.values()
            if run.request.decode_worker == peer
            and (up_to_epoch is None or run.request.decode_epoch <= up_to_epoch)
        ]
        return [action for run in hit for action in self._fail_run(run, error, now)]

    def push_ended(self, event: PushEnded, now: float) -> list[Action]:
        run = self._pushes.owner(event)
        if run is None:
            return self._last_words.ended(event)
        run.pushes.ended(event, now)
        if run.pushes.error is not None:
            error = TransferError(f"push to {run.request.decode_worker} failed: {run.pushes.error}")
            return self._fail_run(run, error, now)
        return self._settle(run, now)

    # --- ends ---------------------------------------------------------------------------------------

    def fail(self, attempt: AttemptId, owner: OwnerId, error: Exception, now: float) -> list[Action]:
        run = self._runs.get(attempt)
        return _refuse(owner, attempt, error) if run is None else self._fail_run(run, error, now)

    def fail_step(self, error: Exception, now: float) -> list[Action]:
        plan, self._plan = self._plan, None
        if plan is None:
            return []
        return [action for chunk in plan.chunks for action in self._fail_run(chunk.run, error, now)]

    def _fail_run(self, run: PrefillRun, error: Exception, now: float) -> list[Action]:
        """Tell once, then wait for its pushes like a cancelled one."""
        if run.attempt not in self._runs:
            return []
        told = run.stage is Stage.SETTLING and not run.handed_over
        actions: list[Action] = [] if told else [Send(run.owner, attempt_failed(run.attempt, error))]
        return [*actions, *self._abandon(run, error, now)]

    def _abandon(self, run: PrefillRun, error: Exception, now: float) -> list[Action]:
        """Stop computing; what its pushes read stays held until they are terminal."""
        run.handed_over = False
        if run.pushes.error is None:
            run.pushes.error = str(error)
        if run.stage is not Stage.SETTLING:
            self._queue.leave(run)
        return self._settle(run, now)

    def _settle(self, run: PrefillRun, now: float) -> list[Action]:
        """The last word on an attempt, once its last push is terminal."""
        if run.stage is not Stage.SETTLING or not run.pushes.settled:
            return []
        del self._runs[run.attempt]
        settled = PushesSettled(attempt=run.attempt)
        if not run.handed_over and run.owner_lost and not run.handover_sent:
            said = self._last_words.say(run.attempt, self._pushes.settling(run, now))
            for owner in run.asked_by:
                self._last_words.ask(run.attempt, owner)
            return [said]
        others: list[Action] = [Send(owner, settled) for owner in run.asked_by]
        if not run.handed_over:
            return [Send(run.owner, settled), *others]
        book = run.pushes
        done = TransferDone(
            attempt=run.attempt,
            bytes_moved=book.bytes_moved,
            exposed_s=max(0.0, (book.last_end or 0.0) - run.compute_end),
            busy_s=book.busy_s,
            path=self._shared.peers.path(run.request.decode_worker).value,
        )
        return [Send(run.owner, done), *others]

    # --- steps --------------------------------------------------------------------------------------

    def schedule(self, now: float, budget: int | None = None) -> tuple[PrefillPlan | None, list[Action]]:
        """The next step, and what is to be done before it. None: nothing can be computed now.

        budget: tokens, where there are to be fewer than usual.
        """
        chunks, begun = self._queue.schedule(self._meter.tokens_per_s, budget)
        actions: list[Action] = [MoveTier(command) for command in self._shared.tiering.commands()]
        for run in begun:
            queue_s = now - run.received
            started = PrefillStarted(attempt=run.attempt, cached_tokens=run.computed, queue_s=queue_s)
            actions += [Send(run.owner, started), *self._pushes.cached_prefix(run, now)]
        self._plan = PrefillPlan(chunks, now) if chunks else None
        return self._plan, actions

    def layers_done(self, plan: PrefillPlan, first: int, last: int, now: float) -> Sequence[Action]:
        """The KV of layers [first, last) of this step is in the pool: push it, while later ones compute."""
        return self._pushes.layers(plan, first, last, now)

    def complete(self, plan: PrefillPlan, results: Sequence[WorkResult], now: float) -> list[Action]:
        """The step is computed and sampled."""
        self._plan = None
        seconds = now - plan.started
        self._meter.count(seconds=seconds, tokens=plan.num_tokens)
        actions: list[Action] = []
        for chunk, result in zip(plan.chunks, results, strict=True):
            run = chunk.run
            run.computed = chunk.end
            run.compute_s += seconds
            if isinstance(result.sampled, SampleFailed):
                actions += self._fail_run(run, result.sampled.error, now)
                continue
            run.prompt_logprobs.extend(result.prompt_logprobs)
            self._queue.remember(chunk)
            if result.sampled is None:
                actions.append(Send(run.owner, PrefillProgress(attempt=run.attempt, tokens_done=chunk.end)))
            else:
                actions += self._first_token(chunk, result.sampled, plan.held_back, now)
        return actions

    def _first_token(
        self, chunk: Chunk, sampled: Sampled, held_back: tuple[int, int] | None, now: float
    ) -> list[Action]:
        run = chunk.run
        assert held_back is not None, "the runner reported every layer"
        finish = finish_reason(run.spec, sampled.token, num_tokens=run.num_tokens + 1, max_len=self._max_len)
        done = PrefillDone(
            attempt=run.attempt,
            token=sampled.token,
            logprobs=sampled.logprobs,
            prompt_logprobs=[None, *run.prompt_logprobs] if run.num_prompt_logprobs is not None else [],
            finish_reason=finish,
            compute_s=run.compute_s,
        )
        actions: list[Action] = [Send(run.owner, done)]
        run.compute_end = now
        if finish is None:
            run.handed_over = run.handover_sent = True
            actions.append(self._pushes.handover(chunk, held_back, sampled, now))
        self._queue.leave(run)
        return [*actions, *self._settle(run, now)]


def _refuse(owner: OwnerId, attempt: AttemptId, error: Exception) -> list[Action]:
    """An attempt that never began: its failure, and the promise that nothing of it is under way."""
    return [Send(owner, attempt_failed(attempt, error)), Send(owner, PushesSettled(attempt=attempt))]
