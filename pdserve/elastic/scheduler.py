"""What a worker does next, in either role: pure, no I/O and no clock of its own.

                  .-- PrefillScheduler: prompts that it reads for decode workers
    one pool  ----+
    one cache     '-- DecodeScheduler: answers that it writes, and prompts that it reads for itself

The role says which new requests it takes. What runs goes on whatever the role, and shares the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from decode.arrivals import NoteStats
from decode.scheduler import DecodeScheduler
from decode.speculation import Speculation
from kvtransfer.protocol import NoteArrived, PeerConnected, PeerFailed, PushEnded, TransferStopped
from pdserve.core.errors import PeerLost, TransferError
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import (
    Cancel,
    ChangeRole,
    ConnectPeer,
    Drain,
    DropPeer,
    Heartbeat,
    Hello,
    Message,
    Role,
    SendPrefixes,
    StartPrefill,
    Undrain,
)
from pdserve.elastic.plan import StepPlan
from pdserve.elastic.role_change import RoleChange
from pdserve.engine.tiers.store import BlocksLoaded, BlockStored, TiersFailed
from pdserve.worker.compute import WorkResult
from pdserve.worker.events import (
    Action,
    CoordinatorLost,
    DrainAsked,
    Event,
    FromCoordinator,
    MoveTier,
    OwnerId,
    UndrainAsked,
)
from pdserve.worker.meter import StepMeter
from pdserve.worker.prefix_feed import PrefixFeed
from pdserve.worker.prefix_moves import PrefixMoves
from pdserve.worker.shared import Shared
from prefill.scheduler import PrefillScheduler


class ElasticScheduler:
    """`pdserve.worker.loop.Scheduler` of every worker."""

    def __init__(
        self,
        shared: Shared,
        *,
        prefill_tokens: int,
        prefill_seqs: int,
        decode_tokens: int,
        decode_seqs: int,
        speculation: Speculation | None = None,
    ) -> None:
        """prefill_tokens: budget of a step that only reads prompts for others. decode_tokens: of one in which
        answers are written too."""
        self._shared = shared
        self._prefill = PrefillScheduler(
            shared, max_num_batched_tokens=prefill_tokens, max_num_seqs=prefill_seqs
        )
        self._decode = DecodeScheduler(
            shared, max_num_seqs=decode_seqs, max_num_batched_tokens=decode_tokens, speculation=speculation
        )
        self._prefixes = PrefixMoves(
            shared.worker,
            shared.pool,
            shared.cache,
            shared.peers,
            shared.layout,
            lambda: shared.duty.draining,
        )
        self._role_change = RoleChange(shared, self._prefill, self._decode)
        self._prefix_feed = PrefixFeed(shared.worker, shared.epoch, shared.cache, shared.tiering)
        self._meter = StepMeter()

    @property
    def notes(self) -> NoteStats:
        return self._decode.notes

    # --- events -------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        actions, done = self._prefixes.handle(event, now)
        return actions if done else [*actions, *self._handle(event, now)]

    def _handle(self, event: Event, now: float) -> list[Action]:
        shared = self._shared
        match event:
            case FromCoordinator(owner, message):
                self._role_change.met(owner)
                if isinstance(message, Hello):
                    self._prefix_feed.met(owner)
                return self._message(owner, message, now)
            case CoordinatorLost(owner):
                self._role_change.lost(owner)
                self._prefix_feed.lost(owner)
                return [*self._prefill.owner_lost(owner, now), *self._decode.owner_lost(owner, now)]
            case NoteArrived():
                return self._decode.note(event, now)
            case PushEnded():
                return [*self._prefill.push_ended(event, now), *self._decode.push_ended(event, now)]
            case PeerConnected():
                shared.peers.connected(event.peer, event.path)
                return []
            case PeerFailed():
                shared.peers.failed(event.peer, event.error)
                return self._peer_lost(event.peer, PeerLost(event.peer, event.error), now, None)
            case DrainAsked() | UndrainAsked():
                shared.duty.process(event)
                return []
            case BlockStored() | BlocksLoaded() | TiersFailed():
                shared.tiering.handle(event)
                return self._decode.fetched(now)
            case TransferStopped():
                raise TransferError(f"the transfer service ended: {event.error or 'stopped'}")
            case _:
                assert_never(event)

    def _message(self, owner: OwnerId, message: Message, now: float) -> list[Action]:
        match message:
            case StartPrefill():
                return self._prefill.message(owner, message, now)
            case Cancel(attempt=attempt) if attempt in self._prefill.attempts:
                return self._prefill.message(owner, message, now)
            case ConnectPeer():
                return self._shared.peers.connect(message)
            case DropPeer(peer=peer, epoch=epoch):
                lost = PeerLost(peer, "its process is gone")
                dropped = self._shared.peers.drop(peer, epoch)
                return [*dropped, *self._peer_lost(peer, lost, now, epoch)]
            case Drain() | Undrain():
                self._shared.duty.coordinator(message)
                return []
            case ChangeRole(role=role):
                return self._role_change.asked(owner, role)
            case SendPrefixes():
                self._prefix_feed.met(owner)
                return []
            case _:
                return self._decode.message(owner, message, now)

    def _peer_lost(self, peer: WorkerId, lost: PeerLost, now: float, epoch: int | None) -> list[Action]:
        return [
            *self._prefill.peer_lost(peer, lost, now, epoch),
            *self._decode.peer_lost(peer, lost, now, epoch),
        ]

    # --- failures -----------------------------------------------------------------------------------

    def fail(self, attempt: AttemptId, owner: OwnerId, error: Exception, now: float) -> list[Action]:
        reads = attempt in self._prefill.attempts or self._shared.duty.role is Role.PREFILL
        if reads and attempt not in self._decode.attempts:
            return self._prefill.fail(attempt, owner, error, now)
        return self._decode.fail(attempt, owner, error, now)

    def fail_step(self, error: Exception, now: float) -> list[Action]:
        actions = [*self._prefill.fail_step(error, now), *self._decode.fail_step(error, now)]
        if not actions:
            raise error
        return actions

    # --- steps --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> tuple[StepPlan | None, list[Action]]:
        """The next step, and what is to be done before it. None: nothing can be computed now."""
        decode, actions = self._decode.schedule(now, alone=not self._prefill.has_work)
        budget = None
        if decode is not None:
            budget = self._decode.prompt_budget(decode)
        prefill, begun = self._prefill.schedule(now, budget)
        if decode is None and prefill is None:
            return None, [*actions, *begun]
        return StepPlan(decode, prefill, now), [*actions, *begun]

    def draft(self, plan: StepPlan, clock: Callable[[], float]) -> None:
        """Have the guesses made that a plan wants; computes, where a model guesses."""
        if plan.decode is not None:
            self._decode.draft(plan.decode, clock)

    def layers_done(self, plan: StepPlan, first: int, last: int, now: float) -> Sequence[Action]:
        """The KV of layers [first, last) of this step is in the pool: push it, while later ones compute."""
        return () if plan.prefill is None else self._prefill.layers_done(plan.prefill, first, last, now)

    def complete(self, plan: StepPlan, results: Sequence[WorkResult], now: float) -> list[Action]:
        """The step is computed and sampled. results: in the order of the plan's works."""
        actions: list[Action] = []
        if plan.decode is not None:
            actions += self._decode.complete(plan.decode, results[: len(plan.turns)], now)
        if plan.prefill is not None:
            actions += self._prefill.complete(plan.prefill, results[len(plan.turns) :], now)
        read = sum(chunk.end - chunk.start for chunk in plan.chunks)
        self._decode.stepped(plan.decode, read, now - plan.started)
        self._meter.count(seconds=now - plan.started, tokens=plan.num_tokens)
        return actions

    # --- time and state -----------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Action]:
        """What ran out; what waits to be moved; conservation of blocks."""
        actions = [*self._decode.sweep(now), *self._prefixes.sweep(now), *self._role_change.sweep()]
        actions += self._prefix_feed.due()
        self._shared.pool.check()
        return actions + [MoveTier(command) for command in self._shared.tiering.commands()]

    def next_wake(self) -> float | None:
        """Deadlines of pushes are the transfer service's; requests' are the coordinator's."""
        wakes = [self._decode.next_wake(), self._prefixes.next_wake()]
        return min((wake for wake in wakes if wake is not None), default=None)

    @property
    def idle(self) -> bool:
        """No request is here, and no peer may still write or is being written to."""
        return self._decode.idle and not self._prefill.attempts

    def audit(self) -> None:
        self._shared.pool.audit()

    def heartbeat(self) -> Heartbeat:
        shared, meter, duty = self._shared, self._meter, self._shared.duty
        prefill, decode, speculation = self._prefill, self._decode, self._decode.speculation
        reads = duty.role is Role.PREFILL
        return Heartbeat(
            worker=shared.worker,
            epoch=shared.epoch,
            blocks=shared.pool.counts(),
            waiting=prefill.num_waiting + decode.num_waiting,
            running=prefill.num_computing + decode.num_running,
            waiting_tokens=prefill.uncomputed_tokens if reads else decode.context_tokens,
            step_s=meter.step_s,
            tokens_per_s=meter.tokens_per_s,
            tokens_computed=meter.tokens,
            busy_s=meter.busy_s,
            prefix_hit_tokens=shared.cache.stats.hit_tokens,
            prefix_query_tokens=shared.cache.stats.query_tokens,
            steps=meter.steps,
            tiers=shared.tiering.counts(),
            pairs=shared.peers.states(),
            preemptions=decode.num_preemptions,
            proposed_at=[] if speculation is None else list(speculation.proposed_at),
            accepted_at=[] if speculation is None else list(speculation.accepted_at),
            draining=duty.draining,
            role=duty.role,
            stopping=duty.stopping,
        )
