"""What a prefill worker does next: pure, no I/O and no clock of its own.

    StartPrefill -> WAITING --blocks for the whole prompt--> COMPUTING --first token--> SETTLING -> last word:
                                                                            TransferDone if all went well,
                                                                            else PushesSettled

Prompts are read earliest TTFT deadline first. A prompt takes blocks for all of its tokens when it starts, so
two half-read prompts can never wait for each other.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import assert_never

from kvtransfer.protocol import (
    NoteArrived,
    PeerConnected,
    PeerFailed,
    Push,
    PushEnded,
    TransferStopped,
)
from pdserve.core.codec import encode
from pdserve.core.errors import (
    InvalidRequest,
    Overloaded,
    PdServeError,
    PeerLost,
    PromptTooLong,
    RequestCancelled,
    TransferError,
)
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import GroupLayout, blocks_for
from pdserve.core.messages import (
    HANDOVER_VERSION,
    Cancel,
    ConnectPeer,
    Drain,
    DropPeer,
    Handover,
    Heartbeat,
    Message,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    PushNote,
    StartDecode,
    StartPrefill,
    TransferDone,
)
from pdserve.engine.batch import Sampled, SampleFailed
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.prefix_cache import PrefixCache, PrefixHashes
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Action, CoordinatorLost, Event, FromCoordinator, OwnerId, Send, SubmitPush
from pdserve.worker.failures import AttemptInUse, attempt_failed
from pdserve.worker.finish import finish_reason
from pdserve.worker.meter import StepMeter
from pdserve.worker.peers import PeerTable
from pdserve.worker.urgency import prefill_urgency
from prefill.pushes import PushBook, blocks_to_push
from prefill.run import Chunk, PrefillPlan, PrefillRun, Stage


class PrefillScheduler:
    def __init__(
        self,
        *,
        worker: WorkerId,
        epoch: int,
        layout: GroupLayout,
        num_blocks: int,
        max_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        prefix_caching: bool,
    ) -> None:
        self._worker, self._epoch = worker, epoch
        self._layout, self._max_len = layout, max_len
        # A chunk is at least a block, or a long prompt would never advance.
        self._budget = max(max_num_batched_tokens, layout.block_tokens)
        self._max_num_seqs = max_num_seqs
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool, block_tokens=layout.block_tokens, enabled=prefix_caching)
        self._runs: dict[AttemptId, PrefillRun] = {}
        self._queue: list[PrefillRun] = []
        """Waiting and computing, most urgent first."""
        self._of_push: dict[int, PrefillRun] = {}
        self._peers = PeerTable()
        self._push_ids = itertools.count()
        self._order = itertools.count()
        self._plan: PrefillPlan | None = None
        self._draining = False
        self._meter = StepMeter()

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case FromCoordinator(owner, message):
                return self._message(owner, message, now)
            case CoordinatorLost(owner):
                return self._owner_lost(owner, now)
            case PushEnded():
                return self._push_ended(event, now)
            case PeerConnected():
                self._peers.connected(event.peer, event.path)
                return []
            case PeerFailed():
                self._peers.forget(event.peer)
                return self._fail_peer(event.peer, PeerLost(event.peer, event.error), now)
            case TransferStopped():
                raise TransferError(f"the transfer service ended: {event.error or 'stopped'}")
            case NoteArrived():
                return []  # nobody pushes to a prefill worker
            case _:
                assert_never(event)

    def _message(self, owner: OwnerId, message: Message, now: float) -> list[Action]:
        match message:
            case StartPrefill():
                return self._start(owner, message, now)
            case Cancel():
                return self._cancel(owner, message, now)
            case ConnectPeer():
                return self._peers.connect(message)
            case DropPeer():
                actions = self._peers.drop(message.peer, message.epoch)
                lost = PeerLost(message.peer, "its process is gone")
                return [*actions, *self._fail_peer(message.peer, lost, now, up_to_epoch=message.epoch)]
            case Drain():
                self._draining = True
            case StartDecode(spec=spec):
                wrong = InvalidRequest(field="role", value="prefill", limit="decode, to run StartDecode")
                return [Send(owner, attempt_failed(spec.attempt, wrong))]
            case _:
                pass  # leases and settled pushes are a decode worker's business
        return []

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
            pushes=PushBook(self._pool, attempt),
        )
        self._runs[attempt] = run
        bisect.insort(self._queue, run, key=lambda r: r.urgency)
        return []

    def _start_error(self, request: StartPrefill) -> PdServeError | None:
        num_tokens, size = len(request.spec.tokens), self._layout.block_tokens
        known = self._peers.epoch(request.decode_worker)
        if self._draining:
            return Overloaded(f"worker {self._worker} is draining")
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
        if run is None:
            return [Send(owner, PushesSettled(attempt=message.attempt))]
        if run.owner != owner:
            return [Send(owner, attempt_failed(run.attempt, AttemptInUse(run.attempt)))]
        return self._abandon(run, RequestCancelled(message.reason), now)

    def _owner_lost(self, owner: OwnerId, now: float) -> list[Action]:
        lost = RequestCancelled("its coordinator is gone")
        actions: list[Action] = []
        for run in [run for run in self._runs.values() if run.owner == owner]:
            run.owner_lost = True
            if not run.handed_over:
                actions += self._abandon(run, lost, now)
        return actions

    def _fail_peer(
        self, peer: WorkerId, error: PdServeError, now: float, *, up_to_epoch: int | None = None
    ) -> list[Action]:
        hit = [
            run
            for run in self._runs.values()
            if run.request.decode_worker == peer
            and (up_to_epoch is None or run.request.decode_epoch <= up_to_epoch)
        ]
        return [action for run in hit for action in self._fail_run(run, error, now)]

    def _push_ended(self, event: PushEnded, now: float) -> list[Action]:
        run = self._of_push.get(event.id)
        if run is None:
            return []
        if event.terminal:
            del self._of_push[event.id]
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
            raise error
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
        self._stop_computing(run)
        return self._settle(run, now)

    def _stop_computing(self, run: PrefillRun) -> None:
        if run.stage is Stage.SETTLING:
            return
        run.stage = Stage.SETTLING
        self._queue.remove(run)
        self._pool.release_all(run.blocks, run.holder)

    def _settle(self, run: PrefillRun, now: float) -> list[Action]:
        """The last word on an attempt, once its last push is terminal."""
        if run.stage is not Stage.SETTLING or not run.pushes.settled:
            return []
        del self._runs[run.attempt]
        if not run.handed_over:
            if run.owner_lost and not run.handover_sent:
                return [self._settling_push(run, now)]
            return [Send(run.owner, PushesSettled(attempt=run.attempt))]
        book = run.pushes
        done = TransferDone(
            attempt=run.attempt,
            bytes_moved=book.bytes_moved,
            exposed_s=max(0.0, (book.last_end or 0.0) - run.compute_end),
            busy_s=book.busy_s,
            path=self._peers.path(run.request.decode_worker).value,
        )
        return [Send(run.owner, done)]

    # --- steps --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> tuple[PrefillPlan | None, list[Action]]:
        """The next step, and what is to be done before it. None: nothing can be computed now."""
        chunks: list[Chunk] = []
        actions: list[Action] = []
        budget, room = self._budget, self._max_num_seqs - self._num_computing()
        full = False
        for run in list(self._queue):
            if run.stage is Stage.WAITING:
                # No skipping ahead: a long prompt would starve behind short ones that keep fitting.
                full = full or room <= 0 or not self._admit(run)
                if full:
                    continue
                room -= 1
                actions += self._began(run, now)
            chunk = self._chunk(run, budget)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
            if budget <= 0:
                break
        self._plan = PrefillPlan(chunks, now) if chunks else None
        return self._plan, actions

    def _num_computing(self) -> int:
        return sum(1 for run in self._queue if run.stage is Stage.COMPUTING)

    def _admit(self, run: PrefillRun) -> bool:
        """Take blocks for the whole prompt, the cached prefix first; False when there are not enough."""
        tokens = run.spec.tokens
        wanted = blocks_for(len(tokens), self._layout.block_tokens)
        # Prompt logprobs need every position computed.
        hashes = run.hashes.of(tokens) if run.num_prompt_logprobs is None else []
        taken = self._cache.reserve(
            hashes, len(tokens), total=wanted, cached_holder=run.holder, fresh_holder=run.holder
        )
        if taken is None:
            return False
        run.blocks = [*taken.cached, *taken.fresh]
        run.computed = len(taken.cached) * self._layout.block_tokens
        run.stage = Stage.COMPUTING
        return True

    def _began(self, run: PrefillRun, now: float) -> list[Action]:
        queue_s = now - run.received
        started = PrefillStarted(attempt=run.attempt, cached_tokens=run.computed, queue_s=queue_s)
        actions: list[Action] = [Send(run.owner, started)]
        cached_here = blocks_to_push(
            start=0,
            end=run.computed,
            final=False,
            dst_cached_tokens=run.request.dst_cached_tokens,
            block_tokens=self._layout.block_tokens,
        )
        if cached_here:
            actions.append(self._push(run, cached_here, (0, self._layout.group.num_layers), now))
        return actions

    def _chunk(self, run: PrefillRun, budget: int) -> Chunk | None:
        """As much of the prompt as the budget allows; up to a block boundary unless it is all of it."""
        end = min(run.num_tokens, run.computed + budget)
        if end < run.num_tokens:
            end -= end % self._layout.block_tokens
        if end <= run.computed:
            return None
        size = self._layout.block_tokens
        for block in run.blocks[run.computed // size : blocks_for(end, size)]:
            self._pool.require_writable(block, run.holder)
        return Chunk(run, run.computed, end)

    def layers_done(self, plan: PrefillPlan, first: int, last: int, now: float) -> list[Action]:
        """The KV of layers [first, last) of this step is in the pool: push it, while later ones compute."""
        is_last_group = last == self._layout.group.num_layers
        if is_last_group:
            plan.held_back = (first, last)
        actions: list[Action] = []
        for chunk in plan.chunks:
            if is_last_group and chunk.final:
                continue
            blocks = self._blocks_of(chunk)
            if blocks:
                actions.append(self._push(chunk.run, blocks, (first, last), now))
        return actions

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
            self._remember(chunk)
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
            handover = Handover(
                version=HANDOVER_VERSION,
                attempt=run.attempt,
                num_tokens=run.num_tokens,
                num_pushes=run.pushes.num_submitted + 1,
                bytes_moved=run.pushes.bytes_planned + self._push_bytes(self._blocks_of(chunk), held_back),
                first_token=sampled.token,
                logprobs=sampled.logprobs,
            )
            actions.append(self._push(run, self._blocks_of(chunk), held_back, now, handover))
        self._stop_computing(run)
        return [*actions, *self._settle(run, now)]

    def _remember(self, chunk: Chunk) -> None:
        """Keep the chunk's full blocks for prompts that begin alike."""
        run, size = chunk.run, self._layout.block_tokens
        hashes = run.hashes.of(run.spec.tokens)
        for index in range(chunk.start // size, chunk.end // size):
            self._cache.insert(hashes[index], run.blocks[index])

    def _blocks_of(self, chunk: Chunk) -> range:
        return blocks_to_push(
            start=chunk.start,
            end=chunk.end,
            final=chunk.final,
            dst_cached_tokens=chunk.run.request.dst_cached_tokens,
            block_tokens=self._layout.block_tokens,
        )

    def _push_bytes(self, blocks: range, layers: tuple[int, int]) -> int:
        return len(blocks) * (layers[1] - layers[0]) * self._layout.layer_bytes

    def _push(
        self,
        run: PrefillRun,
        blocks: range,
        layers: tuple[int, int],
        now: float,
        handover: Handover | None = None,
    ) -> SubmitPush:
        note = PushNote(attempt=run.attempt, sequence=run.pushes.num_submitted, handover=handover)
        push = Push(
            id=next(self._push_ids),
            peer=run.request.decode_worker,
            group=0,
            src_blocks=tuple(run.blocks[i] for i in blocks),
            dst_blocks=tuple(run.request.dst_blocks[i] for i in blocks),
            layers=layers,
            note=encode(note),
            deadline=now + run.request.transfer_deadline_s,
        )
        run.pushes.submitted(push, self._push_bytes(blocks, layers), now)
        self._of_push[push.id] = run
        return SubmitPush(push)

    def _settling_push(self, run: PrefillRun, now: float) -> SubmitPush:
        """Tell the decode worker that nothing of an attempt is to come, when no coordinator relays it.

        Without a hand-over it can only have its blocks in quarantine or wait for more, so one of them takes
        whatever bytes carry the note. (With one it may be running, or over: then nothing may be written.)
        """
        push = Push(
            id=next(self._push_ids),
            peer=run.request.decode_worker,
            group=0,
            src_blocks=(BlockId(0),),
            dst_blocks=(run.request.dst_blocks[-1],),
            layers=(0, 1),
            note=encode(PushesSettled(attempt=run.attempt)),
            deadline=now + run.request.transfer_deadline_s,
        )
        return SubmitPush(push)

    # --- time and state -----------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Action]:
        self._pool.check()
        return []

    def next_wake(self) -> float | None:
        """Deadlines of pushes are the transfer service's; requests' are the coordinator's."""
        return None

    def audit(self) -> None:
        self._pool.audit()

    def heartbeat(self) -> Heartbeat:
        waiting = [run for run in self._queue if run.stage is Stage.WAITING]
        return Heartbeat(
            worker=self._worker,
            epoch=self._epoch,
            blocks=self._pool.counts(),
            waiting=len(waiting),
            running=len(self._queue) - len(waiting),
            waiting_tokens=sum(run.num_tokens - run.computed for run in self._queue),
            step_s=self._meter.step_s,
            tokens_per_s=self._meter.tokens_per_s,
            prefix_hit_tokens=self._cache.stats.hit_tokens,
            prefix_query_tokens=self._cache.stats.query_tokens,
            steps=self._meter.steps,
            draining=self._draining,
        )


def _refuse(owner: OwnerId, attempt: AttemptId, error: Exception) -> list[Action]:
    """An attempt that never began: its failure, and the promise that nothing of it is under way."""
    return [Send(owner, attempt_failed(attempt, error)), Send(owner, PushesSettled(attempt=attempt))]
