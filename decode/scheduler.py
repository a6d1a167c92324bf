"""What a decode worker does next: pure, no I/O and no clock of its own.

StartDecode --blocks--> RECEIVING --every push landed--> RUNNING <--> PREEMPTED
     |                     |                                |
     | no prefill worker   | cancel, lease, lost peer,      '--> finished, failed, cancelled: blocks back
     '--------> RUNNING    | bad hand-over
                           '--> Quarantine --PushesSettled | last push | peer gone--> blocks back
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Final, assert_never

from decode.arrivals import NoteStats, Quarantine
from decode.batch import Batch
from decode.run import DecodePlan, DecodeRun, Source, Stage, Turn
from kvtransfer.protocol import NoteArrived, PeerConnected, PeerFailed, PushEnded, TransferStopped
from pdserve.core.codec import decode
from pdserve.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    PdServeError,
    PeerLost,
    ProtocolError,
    TransferError,
)
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import (
    Cancel,
    ConnectPeer,
    Drain,
    DropPeer,
    FinishReason,
    Heartbeat,
    KvArrived,
    Message,
    PrefillDone,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    PushNote,
    RefusalReason,
    Refused,
    RenewLease,
    Reserved,
    StartDecode,
    StartPrefill,
    Tokens,
)
from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import Sampled, SampleFailed
from pdserve.engine.block_pool import BlockPool, quarantined_by
from pdserve.engine.prefix_cache import PrefixCache, PrefixHashes
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Action, CoordinatorLost, Event, FromCoordinator, OwnerId, Send
from pdserve.worker.failures import AttemptInUse, attempt_failed
from pdserve.worker.finish import finish_reason
from pdserve.worker.meter import StepMeter
from pdserve.worker.peers import PeerTable
from pdserve.worker.urgency import decode_urgency

log = logging.getLogger(__name__)

GONE_PEER_GRACE_S: Final = 1.0
"""After a peer's process ended, its last packets may still sit in this host's socket buffers."""


class LeaseExpired(DeadlineExceeded):
    """The reservation's own deadline, not the request's: another attempt may do better."""

    retryable = True


class DecodeScheduler:
    def __init__(
        self,
        *,
        worker: WorkerId,
        epoch: int,
        block_tokens: int,
        num_blocks: int,
        max_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
    ) -> None:
        self._worker, self._epoch = worker, epoch
        self._block_tokens, self._max_len = block_tokens, max_len
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
        )
        self._runs: dict[AttemptId, DecodeRun] = {}
        self._receiving: dict[AttemptId, DecodeRun] = {}
        self._quarantines: dict[AttemptId, Quarantine] = {}
        self._peers = PeerTable()
        self._order = itertools.count()
        self._plan: DecodePlan | None = None
        self._draining = False
        self._meter = StepMeter()
        self.notes: Final = NoteStats()

    @property
    def num_preemptions(self) -> int:
        return self._batch.num_preemptions

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case FromCoordinator(owner, message):
                return self._message(owner, message, now)
            case CoordinatorLost(owner):
                for run in [run for run in self._runs.values() if run.owner == owner]:
                    self._end(run)
                for quarantine in self._quarantines.values():
                    if quarantine.owner == owner:
                        quarantine.owner = None
                return []
            case NoteArrived():
                return self._note(event, now)
            case PeerConnected():
                self._peers.connected(event.peer, event.path)
                return []
            case PeerFailed():
                self._peers.forget(event.peer)
                return self._fail_peer(event.peer, None, PeerLost(event.peer, event.error))
            case PushEnded():
                return []  # a decode worker pushes nothing yet
            case TransferStopped():
                raise TransferError(f"the transfer service ended: {event.error or 'stopped'}")
            case _:
                assert_never(event)

    def _message(self, owner: OwnerId, message: Message, now: float) -> list[Action]:
        match message:
            case StartDecode():
                return self._start(owner, message, now)
            case Cancel():
                run = self._runs.get(message.attempt)
                if run is not None and run.owner == owner:
                    self._end(run)
            case PushesSettled():
                if self._may_settle(owner, message.attempt):
                    self._settled(message.attempt)
            case RenewLease():
                run = self._receiving.get(message.attempt)
                if run is not None and run.owner == owner:
                    run.lease_until = max(run.lease_until, now + message.lease_s)
            case ConnectPeer():
                return self._peers.connect(message)
            case DropPeer():
                return self._drop_peer(message, now)
            case Drain():
                self._draining = True
            case StartPrefill(spec=spec):
                wrong = InvalidRequest(field="role", value="decode", limit="prefill, to run StartPrefill")
                settled = PushesSettled(attempt=spec.attempt)
                return [Send(owner, attempt_failed(spec.attempt, wrong)), Send(owner, settled)]
            case _:
                pass  # what a coordinator has no business to send changes nothing
        return []

    def _may_settle(self, owner: OwnerId, attempt: AttemptId) -> bool:
        """A coordinator speaks for its own attempts, and for those whose coordinator is gone."""
        run, quarantine = self._receiving.get(attempt), self._quarantines.get(attempt)
        if run is not None:
            return run.owner == owner
        return quarantine is not None and quarantine.owner in (owner, None)

    # --- reservation --------------------------------------------------------------------------------

    def _start(self, owner: OwnerId, message: StartDecode, now: float) -> list[Action]:
        spec = message.spec
        known = self._runs.get(spec.attempt)
        if known is not None and known.owner == owner:
            return []  # said twice
        if known is not None or spec.attempt in self._quarantines:
            return [Send(owner, attempt_failed(spec.attempt, AttemptInUse(spec.attempt)))]
        refusal = self._refusal(message)
        if refusal is not None:
            reason, detail = refusal
            return [Send(owner, Refused(attempt=spec.attempt, reason=reason, detail=detail))]
        run = self._new_run(owner, message, now)
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
            self._receiving[run.attempt] = run
        reserved = Reserved(
            attempt=run.attempt,
            blocks=run.blocks[: blocks_for(len(spec.tokens), self._block_tokens)],
            cached_tokens=run.computed,
        )
        return [Send(owner, reserved)]

    def _refusal(self, message: StartDecode) -> tuple[RefusalReason, str] | None:
        num_tokens, peer = len(message.spec.tokens), message.prefill_worker
        if self._draining:
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
            stage=Stage.RUNNING if peer is None else Stage.RECEIVING,
            hashes=PrefixHashes(spec.cache_salt, self._block_tokens),
            tokens=list(spec.tokens),
            reading=peer is None,
        )

    def _reserve(self, run: DecodeRun) -> bool:
        """Blocks for its tokens and some of the next; a remote writer gets those the cache does not have."""
        num_tokens, size = len(run.tokens), self._block_tokens
        left = max(run.spec.sampling.max_tokens - run.num_output, 0)
        ahead = min(size, left, self._max_len - num_tokens)
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
        if run.source is not None:
            for block in run.blocks[blocks_for(num_tokens, size) :]:
                self._pool.rehold(block, run.receiving, run.computing)
        return True

    def _awaited_blocks(self, run: DecodeRun) -> slice:
        """Those that a prefill worker writes, in the block table of a sequence that receives."""
        return slice(run.remembered, blocks_for(len(run.spec.tokens), self._block_tokens))

    # --- arrival ------------------------------------------------------------------------------------

    def _note(self, event: NoteArrived, now: float) -> list[Action]:
        try:
            note = decode(event.note)
        except ProtocolError as error:
            self.notes.malformed += 1
            log.error("%s: a push of %s carried no note: %s", self._worker, event.peer, error)
            return []
        if isinstance(note, PushesSettled):
            return self._settled_by_peer(note.attempt, event.peer)
        if not isinstance(note, PushNote):
            self.notes.malformed += 1
            log.error("%s: a push of %s carried a %s", self._worker, event.peer, type(note).__name__)
            return []
        run = self._receiving.get(note.attempt)
        if run is None:
            self._late_note(note)
            return []
        if not run.arrivals.add(note):
            self.notes.duplicate += 1
            return []
        error_found = run.arrivals.error(run.attempt, len(run.spec.tokens))
        if error_found is not None:
            return self._fail_run(run, error_found)
        return self._arrived(run) if run.arrivals.complete else []

    def _settled_by_peer(self, attempt: AttemptId, peer: WorkerId) -> list[Action]:
        """A prefill worker without a coordinator says that it has given up."""
        run = self._receiving.get(attempt)
        lost = PeerLost(peer, f"it gave up {attempt}, its coordinator is gone")
        actions = [] if run is None else self._fail_run(run, lost)
        self._settled(attempt)
        return actions

    def _late_note(self, note: PushNote) -> None:
        """Its attempt ended here, or was never here. What it wrote was in quarantine."""
        quarantine = self._quarantines.get(note.attempt)
        if quarantine is None:
            self.notes.unknown += 1
            log.warning("%s: push %d of unknown attempt %s", self._worker, note.sequence, note.attempt)
            return
        self.notes.late += 1
        log.warning("%s: push %d of %s came after its end", self._worker, note.sequence, note.attempt)
        quarantine.arrivals.add(note)
        if quarantine.arrivals.complete:
            self._settled(note.attempt)

    def _arrived(self, run: DecodeRun) -> list[Action]:
        handover = run.arrivals.handover
        assert handover is not None
        for block in run.blocks[self._awaited_blocks(run)]:
            self._pool.rehold(block, run.receiving, run.computing)
        del self._receiving[run.attempt]
        self._batch.join(run)
        run.computed = len(run.tokens)
        self._batch.remember(run)
        arrived = Send(run.owner, KvArrived(attempt=run.attempt))
        return [arrived, *self._emit(run, Sampled(handover.first_token, handover.logprobs))]

    # --- ends ---------------------------------------------------------------------------------------

    def fail(self, attempt: AttemptId, owner: OwnerId, error: Exception, now: float) -> list[Action]:
        run = self._runs.get(attempt)
        return [Send(owner, attempt_failed(attempt, error))] if run is None else self._fail_run(run, error)

    def fail_step(self, error: Exception, now: float) -> list[Action]:
        plan, self._plan = self._plan, None
        if plan is None:
            raise error
        return [action for turn in plan.turns for action in self._fail_run(turn.run, error)]

    def _fail_run(self, run: DecodeRun, error: Exception) -> list[Action]:
        self._end(run)
        return [Send(run.owner, attempt_failed(run.attempt, error))]

    def _end(self, run: DecodeRun) -> None:
        """Take it out. Blocks that a push may still write are set apart; the others are given back."""
        del self._runs[run.attempt]
        if self._receiving.pop(run.attempt, None) is None:
            self._batch.leave(run)
            return
        assert run.source is not None
        awaited = self._awaited_blocks(run)
        blocks = run.blocks[awaited]
        self._pool.quarantine(blocks, run.receiving)
        self._pool.release_all(run.blocks[: awaited.start] + run.blocks[awaited.stop :], run.computing)
        self._quarantines[run.attempt] = Quarantine(
            attempt=run.attempt,
            owner=run.owner,
            blocks=blocks,
            prefill_worker=run.source.worker,
            peer_epoch=run.source.epoch,
            arrivals=run.arrivals,
        )
        if run.arrivals.complete:
            self._settled(run.attempt)

    def _settled(self, attempt: AttemptId) -> None:
        """No write of it can land any more."""
        run = self._receiving.get(attempt)
        if run is not None:
            self._end(run)
        quarantine = self._quarantines.pop(attempt, None)
        if quarantine is not None:
            self._pool.release_all(quarantine.blocks, quarantined_by(attempt))

    def _drop_peer(self, message: DropPeer, now: float) -> list[Action]:
        actions = self._peers.drop(message.peer, message.epoch)
        lost = PeerLost(message.peer, "its process is gone")
        actions += self._fail_peer(message.peer, message.epoch, lost)
        for quarantine in self._quarantines.values():
            if quarantine.prefill_worker == message.peer and quarantine.peer_epoch <= message.epoch:
                quarantine.release_at = now + GONE_PEER_GRACE_S
        return actions

    def _fail_peer(self, peer: WorkerId, up_to_epoch: int | None, error: PdServeError) -> list[Action]:
        hit = [
            run
            for run in self._receiving.values()
            if run.source is not None
            and run.source.worker == peer
            and (up_to_epoch is None or run.source.epoch <= up_to_epoch)
        ]
        return [action for run in hit for action in self._fail_run(run, error)]

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

    def complete(self, plan: DecodePlan, results: Sequence[WorkResult], now: float) -> list[Action]:
        """The step is computed and sampled."""
        self._plan = None
        seconds = now - plan.started
        actions: list[Action] = []
        for turn, result in zip(plan.turns, results, strict=True):
            actions += self._computed(turn, result, seconds)
        self._meter.count(seconds=seconds, tokens=sum(turn.end - turn.start for turn in plan.turns))
        return actions

    def _computed(self, turn: Turn, result: WorkResult, seconds: float) -> list[Action]:
        run, sampled = turn.run, result.sampled
        if isinstance(sampled, SampleFailed):
            return self._fail_run(run, sampled.error)
        if run.reading:
            run.prompt_logprobs.extend(result.prompt_logprobs)
            run.compute_s += seconds
        run.computed = turn.end
        self._batch.remember(run)
        if sampled is None:
            if not run.reading:
                return []  # what preemption threw away is computed again: nobody needs to know
            return [Send(run.owner, PrefillProgress(attempt=run.attempt, tokens_done=turn.end))]
        if not run.reading:
            return self._emit(run, sampled)
        return [*self._prompt_read(run, sampled), *self._emit(run, sampled)]

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

    def _emit(self, run: DecodeRun, sampled: Sampled) -> list[Action]:
        """Append a token, stream it, and end the request if it ends the answer."""
        finish = self._finish(run, sampled.token)
        logprobs: list[TokenLogprobs] = [] if sampled.logprobs is None else [sampled.logprobs]
        message = Tokens(
            attempt=run.attempt,
            first_index=run.num_output,
            tokens=[sampled.token],
            logprobs=logprobs,
            finish_reason=finish,
        )
        run.tokens.append(sampled.token)
        if finish is not None:
            self._end(run)
        return [Send(run.owner, message)]

    def _finish(self, run: DecodeRun, token: int) -> FinishReason | None:
        return finish_reason(run.spec, token, num_tokens=len(run.tokens) + 1, max_len=self._max_len)

    # --- time and state -----------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Action]:
        """Leases and graces that ran out; conservation of blocks."""
        actions: list[Action] = []
        for run in [run for run in self._receiving.values() if run.lease_until <= now]:
            source = run.source.worker if run.source is not None else "?"
            message = f"attempt {run.attempt}: no KV from {source} within its lease"
            actions += self._fail_run(run, LeaseExpired(message))
        for quarantine in list(self._quarantines.values()):
            if quarantine.release_at is not None and quarantine.release_at <= now:
                self._settled(quarantine.attempt)
        self._pool.check()
        return actions

    def next_wake(self) -> float | None:
        times = [run.lease_until for run in self._receiving.values()]
        times += [q.release_at for q in self._quarantines.values() if q.release_at is not None]
        return min(times, default=None)

    def audit(self) -> None:
        self._pool.audit()

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=self._worker,
            epoch=self._epoch,
            blocks=self._pool.counts(),
            waiting=len(self._receiving) + self._batch.num_preempted,
            running=self._batch.num_running,
            waiting_tokens=self._batch.context_tokens,
            step_s=self._meter.step_s,
            tokens_per_s=self._meter.tokens_per_s,
            prefix_hit_tokens=self._cache.stats.hit_tokens,
            prefix_query_tokens=self._cache.stats.query_tokens,
            steps=self._meter.steps,
            draining=self._draining,
        )
