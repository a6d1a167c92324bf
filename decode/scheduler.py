"""What a worker does next for the answers it writes: pure, no I/O and no clock of its own.

StartDecode --blocks--> RECEIVING (reception) --every push landed--> RUNNING (batch) <--> PREEMPTED (batch)
     '-- no prefill worker: reads the prompt itself ------------------^  | ^
                                             to another decode worker:   | '--> MOVING (departures)
                                                                         '--> finished, failed, cancelled

Events reach it through `pdserve.elastic.scheduler`, which knows what both roles of a worker share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from decode.answering import Answering
from decode.arrivals import NoteStats
from decode.batch import Batch
from decode.deferred import Deferred
from decode.departures import Departures
from decode.reception import Reception
from decode.reserving import Reserving
from decode.run import DecodePlan, DecodeRun, Stage, Turn
from decode.speculation import Speculation, standing
from kvtransfer.protocol import NoteArrived, PushEnded
from pdserve.core.errors import PdServeError
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import (
    Cancel,
    Hello,
    KvArrived,
    Message,
    Migrate,
    Preempt,
    Preempted,
    PrefillProgress,
    PrefillStarted,
    PushesSettled,
    RefusalReason,
    Refused,
    RenewLease,
    Reserved,
    StartDecode,
)
from pdserve.engine.batch import Sampled, SampleFailed, SampleResult
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import Action, MoveTier, OwnerId, Send
from pdserve.worker.failures import AttemptInUse, attempt_failed
from pdserve.worker.meter import StepMeter
from pdserve.worker.shared import Shared


class DecodeScheduler:
    def __init__(
        self,
        shared: Shared,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        speculation: Speculation | None = None,
    ) -> None:
        self._shared = shared
        self._block_tokens = block_tokens = shared.layout.block_tokens
        self._batch = Batch(
            shared.pool,
            shared.cache,
            block_tokens=block_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            speculation=speculation,
            gather_tokens=shared.gather_tokens,
        )
        self._speculation = speculation
        self._deferred = Deferred()
        self._reading_meter = StepMeter()
        self._runs: dict[AttemptId, DecodeRun] = {}
        self._reserving = Reserving(shared, self._batch, max_num_seqs=max_num_seqs)
        self._reception = Reception(shared.worker, shared.pool, block_tokens)
        self._departures = Departures(
            shared.pool, self._batch, shared.peers, shared.layout, push_ids=shared.push_ids
        )
        self._answering = Answering(shared.max_len)
        self._owners: set[OwnerId] = set()
        self._plan: DecodePlan | None = None

    # --- state --------------------------------------------------------------------------------------

    @property
    def num_preemptions(self) -> int:
        """Since start."""
        return self._batch.num_preemptions

    @property
    def notes(self) -> NoteStats:
        return self._reception.notes

    @property
    def speculation(self) -> Speculation | None:
        return self._speculation

    @property
    def attempts(self) -> Collection[AttemptId]:
        """That are here."""
        return self._runs.keys()

    @property
    def num_waiting(self) -> int:
        return len(self._reception) + len(self._deferred) + self._batch.num_preempted

    @property
    def num_running(self) -> int:
        return self._batch.num_running

    @property
    def context_tokens(self) -> int:
        return self._batch.context_tokens

    @property
    def idle(self) -> bool:
        """No request is here, and no peer may still write or is being written to."""
        here = self._runs or len(self._deferred) or self._departures
        return not here and not self._reception.num_quarantined

    # --- messages -----------------------------------------------------------------------------------

    def message(self, owner: OwnerId, message: Message, now: float) -> list[Action]:
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
            case Hello():
                self._owners.add(owner)
                return [Send(owner, orphan) for orphan in self._reception.orphans()]
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

    def owner_lost(self, owner: OwnerId, now: float) -> list[Action]:
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

    # --- beginning ----------------------------------------------------------------------------------

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
        refusal = self._reserving.refusal(message, len(self._runs))
        if refusal is not None:
            reason, detail = refusal
            return [Send(owner, Refused(attempt=spec.attempt, reason=reason, detail=detail))]
        run = self._reserving.new_run(owner, message, now)
        if run.reading and not fetched and self._awaits_tiers(run, message):
            return [MoveTier(command) for command in self._shared.tiering.commands()]
        if not self._reserving.reserve(run):
            wanted = blocks_for(len(spec.tokens), self._block_tokens)
            detail = f"{wanted} blocks wanted, {self._shared.pool.counts()}"
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
        speed = self._reading_meter.tokens_per_s
        fetch = self._shared.tiering.fetch(digests, len(run.tokens), speed)
        if fetch is None or fetch.done:
            return False
        self._deferred.add(run.owner, message, fetch)
        return True

    def fetched(self, now: float) -> list[Action]:
        """Something came up from the tiers: requests that waited for it start."""
        ready = self._deferred.take_ready()
        return [
            action for owner, message in ready for action in self._start(owner, message, now, fetched=True)
        ]

    # --- arrival ------------------------------------------------------------------------------------

    def note(self, event: NoteArrived, now: float) -> list[Action]:
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
        actions: list[Action] = [Send(run.owner, KvArrived(attempt=run.attempt))]
        if handover.tokens:
            actions.append(self._answering.again(run, handover.tokens, handover.token_logprobs))
        first = Sampled(handover.first_token, handover.logprobs)
        sent, finish = self._answering.append(run, [first])
        return [*actions, sent, *([] if finish is None else self._end(run, now))]

    def push_ended(self, event: PushEnded, now: float) -> list[Action]:
        return self._departures.push_ended(event, now)

    def peer_lost(
        self, peer: WorkerId, error: PdServeError, now: float, up_to_epoch: int | None
    ) -> list[Action]:
        """up_to_epoch: its processes up to that one are gone for certain; None: it failed, and may live."""
        actions = self._fail_all(self._reception.written_by(peer, up_to_epoch), error, now)
        actions += self._departures.peer_lost(peer, error, now, up_to_epoch)
        if up_to_epoch is not None:
            self._reception.writer_gone(peer, up_to_epoch, now)
        return actions

    # --- ends ---------------------------------------------------------------------------------------

    def fail(self, attempt: AttemptId, owner: OwnerId, error: Exception, now: float) -> list[Action]:
        run = self._runs.get(attempt)
        return (
            [Send(owner, attempt_failed(attempt, error))] if run is None else self._fail_run(run, error, now)
        )

    def fail_step(self, error: Exception, now: float) -> list[Action]:
        plan, self._plan = self._plan, None
        return [] if plan is None else self._fail_all([turn.run for turn in plan.turns], error, now)

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

    # --- steps --------------------------------------------------------------------------------------

    def schedule(self, now: float, *, alone: bool = True) -> tuple[DecodePlan | None, list[Action]]:
        """The next step, and what is to be said before it. None: nothing can be computed now.

        alone: nothing else is computed in it, so that guesses may pay.
        """
        self._plan = plan = self._batch.schedule(now, alone=alone)
        actions: list[Action] = []
        for turn in plan.turns if plan else ():
            run = turn.run
            if run.reading and not run.began:
                run.began = True
                queue_s = now - run.received
                started = PrefillStarted(attempt=run.attempt, cached_tokens=run.computed, queue_s=queue_s)
                actions.append(Send(run.owner, started))
        return plan, actions

    def prompt_budget(self, plan: DecodePlan) -> int:
        """Tokens of other prompts that may be in the same step."""
        answers = [turn.run for turn in plan.turns if turn.decodes]
        read = sum(turn.end - turn.start for turn in plan.turns if not turn.decodes)
        if self._batch.gathered(read):
            return self._block_tokens
        return max(self._batch.pace.prompt_tokens(answers) - read, self._block_tokens)

    def stepped(self, plan: DecodePlan | None, prompt_tokens: int, seconds: float) -> None:
        """A step took so long, with so many tokens of prompts for others in it."""
        turns = plan.turns if plan else ()
        read = sum(turn.end - turn.start for turn in turns if not turn.decodes)
        answers = sum(turn.decodes for turn in turns)
        self._batch.pace.stepped(num_answers=answers, prompt_tokens=prompt_tokens + read, seconds=seconds)

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
        return actions + self._departures.stepped(now)

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
        read = self._answering.prompt_read(run, sampled) if run.reading else []
        return [*read, *self._emit(turn, [sampled, *result.after_drafts], now)]

    def _emit(self, turn: Turn, results: Sequence[SampleResult], now: float) -> list[Action]:
        """Stream what was sampled, as far as the guesses held, and end the request if it ends the answer."""
        run = turn.run
        kept = standing(turn.drafts, results)
        if self._speculation is not None:
            self._speculation.judged(turn, len(kept) - 1)
        tokens = [result for result in kept if isinstance(result, Sampled)]
        sent, finish = self._answering.append(run, tokens)
        # Guesses that held were computed in this step; the others' KV is written over in the next.
        run.computed = len(run.tokens) - 1
        self._batch.remember(run)
        last = kept[-1]
        if finish is not None:
            return [sent, *self._end(run, now)]
        return [sent, *self._fail_run(run, last.error, now)] if isinstance(last, SampleFailed) else [sent]

    # --- time ---------------------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Action]:
        """Leases and graces that ran out."""
        return [
            action
            for run, error in self._reception.expired(now)
            for action in self._fail_run(run, error, now)
        ]

    def next_wake(self) -> float | None:
        return self._reception.next_wake()
