"""What a decode worker does next: pure, no I/O and no clock of its own.

StartDecode --blocks--> RECEIVING (reception) --every push landed--> RUNNING (batch) <--> PREEMPTED (batch)
     '-- no prefill worker: reads the prompt itself ------------------^  | ^
                                             to another decode worker:   | '--> MOVING (departures)
                                                                         '--> finished, failed, cancelled
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import assert_never

from decode.arrivals import NoteStats
from decode.batch import Batch
from decode.deferred import Deferred
from decode.departures import Departures
from decode.reception import Reception
from decode.run import DecodePlan, DecodeRun, Source, Stage, Turn
from decode.speculation import Speculation, standing
from kvtransfer.protocol import NoteArrived, PeerConnected, PeerFailed, PushEnded, TransferStopped
from pdserve.core.errors import (
    InvalidRequest,
    PeerLost,
    TransferError,
)
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import GroupLayout, blocks_for
from pdserve.core.messages import (
    Cancel,
    ConnectPeer,
    Drain,
    DropPeer,
    FinishReason,
    Heartbeat,
    Hello,
    KvArrived,
    Message,
    Migrate,
    Preempt,
    Preempted,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    RefusalReason,
    Refused,
    RenewLease,
    RequestSpec,
    Reserved,
    Role,
    StartDecode,
    StartPrefill,
    Tokens,
    Undrain,
)
from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import Sampled, SampleFailed, SampleResult
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.prefix_cache import PrefixCache, PrefixHashes
from pdserve.engine.tiers.store import BlocksLoaded, BlockStored, TierPort, TiersFailed
from pdserve.worker.compute import WorkResult
from pdserve.worker.duty import Duty
from pdserve.worker.events import (
    Action,
    CoordinatorLost,
    DrainAsked,
    Event,
    FromCoordinator,
    MoveTier,
    OwnerId,
    Send,
    UndrainAsked,
)
from pdserve.worker.failures import AttemptInUse, attempt_failed
from pdserve.worker.finish import finish_reason
from pdserve.worker.meter import StepMeter
from pdserve.worker.peers import PeerTable
from pdserve.worker.prefix_moves import PrefixMoves
from pdserve.worker.tiering import Tiering
from pdserve.worker.urgency import decode_urgency


class DecodeScheduler:
    def __init__(
        self,
        *,
        worker: WorkerId,
        epoch: int,
        layout: GroupLayout,
        num_blocks: int,
        max_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
        speculation: Speculation | None = None,
        tiers: TierPort | None = None,
    ) -> None:
        self._worker, self._epoch = worker, epoch
        self._block_tokens = block_tokens = layout.block_tokens
        self._max_len = max_len
        # Some arrive while the batch is full, so that a seat is taken again in the next step.
        self._max_runs = max_num_seqs + max(1, max_num_seqs // 4)
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool, block_tokens=block_tokens, enabled=prefix_caching)
        self._batch = Batch(
            self._pool,
            self._cache,
            block_tokens=block_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            speculation=speculation,
        )
        self._speculation = speculation
        self._tiering = Tiering(self._pool, self._cache, tiers, block_tokens=block_tokens)
        self._deferred = Deferred()
        self._reading_meter = StepMeter()
        self._runs: dict[AttemptId, DecodeRun] = {}
        self._reception = Reception(worker, self._pool, block_tokens)
        self._peers = PeerTable()
        self._departures = Departures(self._pool, self._batch, self._peers, layout)
        self._owners: set[OwnerId] = set()
        self._order = itertools.count()
        self._plan: DecodePlan | None = None
        self._duty = Duty(Role.DECODE)
        self._prefixes = PrefixMoves(
            worker, self._pool, self._cache, self._peers, layout, lambda: self._duty.draining
        )
        self._meter = StepMeter()

    @property
    def num_preemptions(self) -> int:
        return self._batch.num_preemptions

    @property
    def notes(self) -> NoteStats:
        return self._reception.notes

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        actions, done = self._prefixes.handle(event, now)
        return actions if done else [*actions, *self._handle(event, now)]

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case FromCoordinator(owner, message):
                return self._message(owner, message, now)
            case CoordinatorLost(owner):
                return self._owner_lost(owner, now)
            case NoteArrived():
                return self._note(event, now)
            case PeerConnected():
                self._peers.connected(event.peer, event.path)
                return []
            case PeerFailed():
                self._peers.forget(event.peer)
                lost = PeerLost(event.peer, event.error)
                failed = self._fail_all(self._reception.written_by(event.peer), lost, now)
                return failed + self._departures.peer_lost(event.peer, lost, now, None)
            case PushEnded():
                return self._departures.push_ended(event, now)
            case DrainAsked() | UndrainAsked():
                self._duty.process(event)
                return []
            case BlockStored() | BlocksLoaded() | TiersFailed():
                self._tiering.handle(event)
                return self._fetched(now)
            case TransferStopped():
                raise TransferError(f"the transfer service ended: {event.error or 'stopped'}")
            case _:
                assert_never(event)

    def _message(self, owner: OwnerId, message: Message, now: float) -> list[Action]:
        match message:
            case StartDecode():
                return self._start(owner, message, now)
            case Migrate():
                return self._departures.start(owner, message, self._runs.get(message.attempt), now)
            case Cancel():
                return self._cancel(owner, message.attempt, now)
            case Preempt():
                return self._preempt(owner, message.attempt, now)
            case PushesSettled():
                if self._reception.may_settle(owner, message.attempt):
                    return self._settled(message.attempt, now)
            case RenewLease():
                self._reception.renew(owner, message.attempt, now + message.lease_s)
            case ConnectPeer():
                return self._peers.connect(message)
            case DropPeer():
                return self._drop_peer(message, now)
            case Drain() | Undrain():
                self._duty.coordinator(message)
            case Hello():
                self._owners.add(owner)
                return [Send(owner, orphan) for orphan in self._reception.orphans()]
            case StartPrefill(spec=spec):
                wrong = InvalidRequest(field="role", value="decode", limit="prefill, to run StartPrefill")
                settled = PushesSettled(attempt=spec.attempt)
                return [Send(owner, attempt_failed(spec.attempt, wrong)), Send(owner, settled)]
            case _:
                pass  # what a coordinator has no business to send changes nothing
        return []

    def _cancel(self, owner: OwnerId, attempt: AttemptId, now: float) -> list[Action]:
        run = self._runs.get(attempt)
        if run is not None:
            return self._end(run, now) if run.owner == owner else []
        if self._deferred.owner(attempt) is not None:
            if self._deferred.owner(attempt) == owner:
                self._deferred.drop(attempt)
            return []
        if self._departures.knows(attempt):
            return self._departures.cancel(owner, attempt, now)
        if self._reception.quarantines(attempt):
            return []
        return [Send(owner, PushesSettled(attempt=attempt))]

    def _preempt(self, owner: OwnerId, attempt: AttemptId, now: float) -> list[Action]:
        """Give a request up for a more urgent one; its full blocks stay cached while there is room."""
        run = self._runs.get(attempt)
        if run is None or run.owner != owner or run.leaving or run.stage is Stage.RECEIVING:
            return []
        self._batch.num_preemptions += 1
        # Said first: it is the last word of the attempt.
        return [Send(owner, Preempted(attempt=attempt)), *self._end(run, now)]

    def _owner_lost(self, owner: OwnerId, now: float) -> list[Action]:
        """Its requests end. Who else is there may find out when blocks it left in quarantine are safe."""
        self._owners.discard(owner)
        self._departures.owner_lost(owner)
        self._deferred.owner_lost(owner)
        actions: list[Action] = []
        for run in [run for run in self._runs.values() if run.owner == owner]:
            actions += self._end(run, now)
        self._reception.owner_lost(owner)
        orphans = self._reception.orphans()
        return actions + [Send(other, orphan) for other in sorted(self._owners) for orphan in orphans]

    # --- reservation --------------------------------------------------------------------------------

    def _start(
        self, owner: OwnerId, message: StartDecode, now: float, *, fetched: bool = False
    ) -> list[Action]:
        """fetched: its prefix has come from the tiers below the pool, or will not."""
        spec = message.spec
        known = self._runs.get(spec.attempt)
        known_owner = self._deferred.owner(spec.attempt) if known is None else known.owner
        if known_owner == owner:
            return []  # said twice
        if known_owner is not None or self._reception.quarantines(spec.attempt):
            return [Send(owner, attempt_failed(spec.attempt, AttemptInUse(spec.attempt)))]
        refusal = self._refusal(message)
        if refusal is not None:
            reason, detail = refusal
            return [Send(owner, Refused(attempt=spec.attempt, reason=reason, detail=detail))]
        run = self._new_run(owner, message, now)
        if run.reading and not fetched and self._awaits_tiers(run, message):
            return self._move_tiers()
        if not self._reserve(run):
            detail = (
                f"{blocks_for(len(spec.tokens), self._block_tokens)} blocks wanted, {self._pool.counts()}"
            )
            refused = Refused(attempt=spec.attempt, reason=RefusalReason.NO_BLOCKS, detail=detail)
            return [Send(owner, refused)]
        self._runs[run.attempt] = run
        if run.source is None:
            self._batch.join(run)
        else:
            self._reception.wait(run)
        reserved = Reserved(
            attempt=run.attempt,
            blocks=run.blocks[: blocks_for(len(spec.tokens) + run.ahead, self._block_tokens)],
            cached_tokens=run.computed,
        )
        return [Send(owner, reserved)]

    def _awaits_tiers(self, run: DecodeRun, message: StartDecode) -> bool:
        """A part of the prompt's prefix is below the pool, and is brought up before the request starts.

        Not where a prefill worker pushes: it does so while it computes, so nothing would come sooner.
        """
        digests = [] if run.num_prompt_logprobs is not None else run.hashes.of(run.tokens)
        fetch = self._tiering.fetch(digests, len(run.tokens), self._reading_meter.tokens_per_s)
        if fetch is None or fetch.done:
            return False
        self._deferred.add(run.owner, message, fetch)
        return True

    def _fetched(self, now: float) -> list[Action]:
        ready = self._deferred.take_ready()
        return [
            action for owner, message in ready for action in self._start(owner, message, now, fetched=True)
        ]

    def _move_tiers(self) -> list[Action]:
        return [MoveTier(command) for command in self._tiering.commands()]

    def _refusal(self, message: StartDecode) -> tuple[RefusalReason, str] | None:
        num_tokens, peer = len(message.spec.tokens), message.prefill_worker
        if self._duty.draining:
            return RefusalReason.DRAINING, f"worker {self._worker} is draining"
        if not 1 <= num_tokens < self._max_len:
            limit = f"1 to {self._max_len - 1}, as this worker holds {self._max_len} with the answer"
            return RefusalReason.TOO_LONG, f"{num_tokens} tokens, must be {limit}"
        if peer is not None and self._peers.epoch(peer) is None:
            return RefusalReason.UNKNOWN_PEER, f"prefill worker {peer} is not connected"
        if len(self._runs) >= self._max_runs:
            return RefusalReason.BATCH_FULL, f"{len(self._runs)} requests are here"
        if self._batch.num_preempted:
            waiting = self._batch.num_preempted
            return RefusalReason.NO_BLOCKS, f"{waiting} preempted requests wait for blocks first"
        return None

    def _new_run(self, owner: OwnerId, message: StartDecode, now: float) -> DecodeRun:
        spec, peer = message.spec, message.prefill_worker
        epoch = None if peer is None else self._peers.epoch(peer)
        return DecodeRun(
            owner=owner,
            spec=spec,
            urgency=decode_urgency(spec, next(self._order)),
            source=None if peer is None or epoch is None else Source(peer, epoch),
            received=now,
            lease_until=now + message.lease_s,
            ahead=self._ahead(spec, message.ahead_tokens),
            stage=Stage.RUNNING if peer is None else Stage.RECEIVING,
            hashes=PrefixHashes(spec.cache_salt, self._block_tokens),
            tokens=list(spec.tokens),
            reading=peer is None,
        )

    def _reserve(self, run: DecodeRun) -> bool:
        """Blocks for its tokens and some of the next; a remote writer gets those the cache does not have."""
        num_tokens, size = len(run.tokens), self._block_tokens
        ahead = max(run.ahead, self._ahead(run.spec, size))
        read_all = run.num_prompt_logprobs is not None
        taken = self._cache.reserve(
            [] if read_all else run.hashes.of(run.tokens),
            num_tokens,
            total=blocks_for(num_tokens + ahead, size),
            spare=self._batch.spare_blocks,
            cached_holder=run.computing,
            fresh_holder=run.computing if run.source is None else run.receiving,
        )
        if taken is None:
            return False
        run.blocks = [*taken.cached, *taken.fresh]
        run.remembered = len(taken.cached)
        run.computed = run.remembered * size
        return True

    def _ahead(self, spec: RequestSpec, wanted: int) -> int:
        """Up to `wanted` tokens more, as far as the answer can get so long."""
        left = max(spec.sampling.max_tokens - spec.num_output_tokens, 0)
        return max(min(wanted, left, self._max_len - len(spec.tokens)), 0)

    # --- arrival ------------------------------------------------------------------------------------

    def _note(self, event: NoteArrived, now: float) -> list[Action]:
        match self._reception.note(event):
            case None:
                return []
            case (run, None):
                return self._arrived(run, now)
            case (run, error):
                return self._fail_run(run, error, now)

    def _arrived(self, run: DecodeRun, now: float) -> list[Action]:
        handover = run.arrivals.handover
        assert handover is not None
        self._reception.arrived(run)
        run.tokens += handover.tokens
        self._batch.join(run)
        run.computed = len(run.tokens)
        self._batch.remember(run)
        arrived = Send(run.owner, KvArrived(attempt=run.attempt))
        actions = [arrived]
        if handover.tokens:
            # Said once more: the coordinator may not have heard them from the worker that wrote them.
            run.logprobs += handover.token_logprobs
            again = Tokens(
                attempt=run.attempt,
                first_index=run.spec.num_output_tokens,
                tokens=handover.tokens,
                logprobs=handover.token_logprobs,
            )
            actions.append(Send(run.owner, again))
        first = Sampled(handover.first_token, handover.logprobs)
        sent, finish = self._append(run, [first])
        return [*actions, sent, *([] if finish is None else self._end(run, now))]

    # --- ends ---------------------------------------------------------------------------------------

    def fail(self, attempt: AttemptId, owner: OwnerId, error: Exception, now: float) -> list[Action]:
        run = self._runs.get(attempt)
        return (
            [Send(owner, attempt_failed(attempt, error))] if run is None else self._fail_run(run, error, now)
        )

    def fail_step(self, error: Exception, now: float) -> list[Action]:
        plan, self._plan = self._plan, None
        if plan is None:
            raise error
        return self._fail_all([turn.run for turn in plan.turns], error, now)

    def _fail_run(self, run: DecodeRun, error: Exception, now: float) -> list[Action]:
        return [Send(run.owner, attempt_failed(run.attempt, error)), *self._end(run, now)]

    def _fail_all(self, runs: Sequence[DecodeRun], error: Exception, now: float) -> list[Action]:
        return [action for run in runs for action in self._fail_run(run, error, now)]

    def _end(self, run: DecodeRun, now: float) -> list[Action]:
        """Take it out. Blocks that a push may still write are set apart; the others are given back."""
        del self._runs[run.attempt]
        if self._speculation is not None:
            self._speculation.forget(run)
        if run.attempt in self._reception:
            self._reception.abandon(run)
            return []
        self._batch.leave(run)
        return self._departures.run_ended(run, now)

    def _settled(self, attempt: AttemptId, now: float) -> list[Action]:
        """No write of it can land any more: it will not be whole if it is not."""
        actions: list[Action] = []
        if attempt in self._reception:
            actions = self._end(self._runs[attempt], now)
        self._reception.settle(attempt)
        return actions

    def _drop_peer(self, message: DropPeer, now: float) -> list[Action]:
        actions = self._peers.drop(message.peer, message.epoch)
        lost = PeerLost(message.peer, "its process is gone")
        actions += self._fail_all(self._reception.written_by(message.peer, message.epoch), lost, now)
        actions += self._departures.peer_lost(message.peer, lost, now, message.epoch)
        self._reception.writer_gone(message.peer, message.epoch, now)
        return actions

    # --- steps --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> tuple[DecodePlan | None, list[Action]]:
        """The next step, and what is to be said before it. None: nothing can be computed now."""
        self._plan = plan = self._batch.schedule(now)
        actions: list[Action] = []
        for turn in plan.turns if plan else ():
            run = turn.run
            if run.reading and not run.began:
                run.began = True
                queue_s = now - run.received
                started = PrefillStarted(attempt=run.attempt, cached_tokens=run.computed, queue_s=queue_s)
                actions.append(Send(run.owner, started))
        return plan, actions

    def draft(self, plan: DecodePlan, clock: Callable[[], float]) -> None:
        """Have the guesses made that a plan wants; computes, where a model guesses."""
        if self._speculation is not None:
            self._speculation.fill(plan, clock)

    def complete(self, plan: DecodePlan, results: Sequence[WorkResult], now: float) -> list[Action]:
        """The step is computed and sampled."""
        self._plan = None
        seconds = now - plan.started
        if self._speculation is not None:
            self._speculation.stepped(plan, seconds)
        actions: list[Action] = []
        for turn, result in zip(plan.turns, results, strict=True):
            actions += self._computed(turn, result, seconds, now)
        actions += self._departures.stepped(now)
        self._meter.count(seconds=seconds, tokens=sum(turn.end - turn.start for turn in plan.turns))
        return actions

    def _computed(self, turn: Turn, result: WorkResult, seconds: float, now: float) -> list[Action]:
        run, sampled = turn.run, result.sampled
        if isinstance(sampled, SampleFailed):
            return self._fail_run(run, sampled.error, now)
        if run.reading:
            run.prompt_logprobs.extend(result.prompt_logprobs)
            run.compute_s += seconds
            self._reading_meter.count(seconds=seconds, tokens=turn.end - turn.start)
        run.computed = turn.end
        self._batch.remember(run)
        if sampled is None:
            if not run.reading:
                return []  # what preemption threw away is computed again: nobody needs to know
            return [Send(run.owner, PrefillProgress(attempt=run.attempt, tokens_done=turn.end))]
        read = self._prompt_read(run, sampled) if run.reading else []
        return [*read, *self._emit(turn, [sampled, *result.after_drafts], now)]

    def _prompt_read(self, run: DecodeRun, sampled: Sampled) -> list[Action]:
        """What a prefill worker would have said."""
        wants_logprobs = run.num_prompt_logprobs is not None
        done = PrefillDone(
            attempt=run.attempt,
            token=sampled.token,
            logprobs=sampled.logprobs,
            prompt_logprobs=[None, *run.prompt_logprobs] if wants_logprobs else [],
            finish_reason=self._finish(run, sampled.token),
            compute_s=run.compute_s,
        )
        run.reading = False
        return [Send(run.owner, done), Send(run.owner, KvArrived(attempt=run.attempt))]

    def _emit(self, turn: Turn, results: Sequence[SampleResult], now: float) -> list[Action]:
        """Stream what was sampled, as far as the guesses held, and end the request if it ends the answer."""
        run = turn.run
        standing_results = standing(turn.drafts, results)
        if self._speculation is not None:
            self._speculation.judged(turn, len(standing_results) - 1)
        tokens = [result for result in standing_results if isinstance(result, Sampled)]
        sent, finish = self._append(run, tokens)
        # Guesses that held were computed in this step; the others' KV is written over in the next.
        run.computed = len(run.tokens) - 1
        self._batch.remember(run)
        last = standing_results[-1]
        if finish is not None:
            return [sent, *self._end(run, now)]
        return [sent, *self._fail_run(run, last.error, now)] if isinstance(last, SampleFailed) else [sent]

    def _append(self, run: DecodeRun, sampled: Sequence[Sampled]) -> tuple[Send, FinishReason | None]:
        """Up to the token that ends the answer, if one does."""
        first_index, finish = run.num_output, None
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for one in sampled:
            finish = self._finish(run, one.token)
            tokens.append(one.token)
            run.tokens.append(one.token)
            if one.logprobs is not None:
                logprobs.append(one.logprobs)
            if finish is not None:
                break
        run.logprobs += logprobs
        message = Tokens(
            attempt=run.attempt,
            first_index=first_index,
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=finish,
        )
        return Send(run.owner, message), finish

    def _finish(self, run: DecodeRun, token: int) -> FinishReason | None:
        return finish_reason(run.spec, token, num_tokens=len(run.tokens) + 1, max_len=self._max_len)

    # --- time and state -----------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Action]:
        """Leases and graces that ran out; conservation of blocks."""
        actions: list[Action] = []
        for run, error in self._reception.expired(now):
            actions += self._fail_run(run, error, now)
        self._pool.check()
        return [*actions, *self._prefixes.sweep(now), *self._move_tiers()]

    def next_wake(self) -> float | None:
        wakes = [self._reception.next_wake(), self._prefixes.next_wake()]
        return min((wake for wake in wakes if wake is not None), default=None)

    @property
    def idle(self) -> bool:
        """No request is here, and no peer may still write or is being written to."""
        return not self._runs and not self._reception.num_quarantined and not self._departures

    def audit(self) -> None:
        self._pool.audit()

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=self._worker,
            epoch=self._epoch,
            blocks=self._pool.counts(),
            waiting=len(self._reception) + len(self._deferred) + self._batch.num_preempted,
            running=self._batch.num_running,
            waiting_tokens=self._batch.context_tokens,
            step_s=self._meter.step_s,
            tokens_per_s=self._meter.tokens_per_s,
            tokens_computed=self._meter.tokens,
            busy_s=self._meter.busy_s,
            prefix_hit_tokens=self._cache.stats.hit_tokens,
            prefix_query_tokens=self._cache.stats.query_tokens,
            steps=self._meter.steps,
            tiers=self._tiering.counts(),
            preemptions=self._batch.num_preemptions,
            proposed_at=[] if self._speculation is None else list(self._speculation.proposed_at),
            accepted_at=[] if self._speculation is None else list(self._speculation.accepted_at),
            draining=self._duty.draining,
            role=self._duty.role,
            stopping=self._duty.stopping,
        )
