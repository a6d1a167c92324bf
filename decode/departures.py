"""Sequences on their way to another decode worker: a drained worker's, with their KV. Pure.

    Migrate --> COPYING: full blocks are pushed, the sequence runs on
                   '-- all landed, or the target's room is used up --> AWAY: it pauses; the rest goes with the
                                                                       hand-over
    Cancel(attempt): it runs there, or nowhere  -> its blocks are given back
    Cancel(to), or a push failed                -> it goes on here

The last word (`TransferDone`, or `PushesSettled` where anything went wrong) follows the end of the last push.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from decode.batch import Batch
from decode.run import DecodeRun, Stage
from kvtransfer.protocol import Push, PushEnded
from pdserve.core.codec import encode
from pdserve.core.errors import InvalidRequest, Overloaded, PdServeError, PeerLost, TransferError
from pdserve.core.handover import HANDOVER_VERSION, Handover, PushNote
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.layout import GroupLayout, blocks_for
from pdserve.core.messages import Migrate, PushesSettled, TransferDone
from pdserve.engine.block_pool import BlockPool
from pdserve.worker.events import Action, OwnerId, Send, SubmitPush
from pdserve.worker.failures import attempt_failed
from pdserve.worker.last_words import LastWords
from pdserve.worker.peers import PeerTable
from pdserve.worker.pushes import PushBook


class _Stage(Enum):
    COPYING = "copying"
    AWAY = "away"
    """The hand-over is under way or has landed, and nothing went wrong since."""
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class _Departure:
    owner: OwnerId
    order: Migrate
    run: DecodeRun | None
    """None: it has ended here."""
    pushes: PushBook
    pushed_blocks: int
    """Of the sequence's block table, from its start: there, or on the way."""
    stage: _Stage = _Stage.COPYING
    paused_at: float = 0.0
    handover_sent: bool = False
    owner_lost: bool = False
    said: bool = False
    """Its last word."""
    asked_by: list[OwnerId] = field(default_factory=list)
    """Coordinators, besides its own, that want to know when nothing can land any more."""


class Departures:
    """Every migration from here, until its last word is said and it is known where the sequence runs."""

    def __init__(
        self,
        pool: BlockPool,
        batch: Batch,
        peers: PeerTable,
        layout: GroupLayout,
        *,
        push_ids: Iterator[int],
    ) -> None:
        self._pool, self._batch, self._peers, self._layout = pool, batch, peers, layout
        self._of: dict[AttemptId, _Departure] = {}
        self._leaving: dict[AttemptId, _Departure] = {}
        self._ids = push_ids
        self._pushes: dict[int, _Departure] = {}
        self._last_words = LastWords()

    def __len__(self) -> int:
        return len(self._of) + len(self._last_words)

    def knows(self, to: AttemptId) -> bool:
        return to in self._of or to in self._last_words

    # --- beginning ----------------------------------------------------------------------------------

    def start(self, owner: OwnerId, order: Migrate, run: DecodeRun | None, now: float) -> list[Action]:
        error = self._error(owner, order, run)
        if error is not None or run is None:
            told = attempt_failed(order.to, error or InvalidRequest(field="attempt", value="", limit=""))
            return [Send(owner, told), Send(owner, PushesSettled(attempt=order.to))]
        size = self._layout.block_tokens
        departure = _Departure(
            owner=owner,
            order=order,
            run=run,
            pushes=PushBook(self._pool, order.to),
            pushed_blocks=order.dst_cached_tokens // size,
        )
        self._of[order.to] = departure
        self._leaving[run.attempt] = departure
        run.leaving = True
        full = run.computed // size
        # Nothing to copy first, or the next step would outgrow the target's blocks.
        if full <= departure.pushed_blocks or self._overflows(order, len(run.tokens)):
            return self._hand_over(departure, run, now)
        blocks = range(departure.pushed_blocks, full)
        departure.pushed_blocks = full
        return [self._push(departure, run, blocks, now, None)]

    def _error(self, owner: OwnerId, order: Migrate, run: DecodeRun | None) -> PdServeError | None:
        if run is None or run.owner != owner:
            return Overloaded(f"attempt {order.attempt} does not run here any more")
        if run.attempt in self._leaving or order.to in self._of:
            return Overloaded(f"attempt {order.attempt} is on its way already")
        if run.stage is not Stage.RUNNING or run.reading or run.remaining != 1:
            return Overloaded(f"attempt {order.attempt} has tokens to compute first")
        known = self._peers.epoch(order.decode_worker)
        if known != order.decode_epoch:
            found = "not connected" if known is None else f"of epoch {known}"
            return PeerLost(order.decode_worker, f"wanted epoch {order.decode_epoch}, it is {found}")
        if order.dst_cached_tokens % self._layout.block_tokens or not (
            0 <= order.dst_cached_tokens < order.num_tokens <= run.computed
        ):
            limit = f"a beginning of its {run.computed} computed tokens"
            return InvalidRequest(field="num_tokens", value=order.num_tokens, limit=limit)
        if self._overflows(order, run.computed):
            return Overloaded(f"attempt {order.attempt} has outgrown {len(order.dst_blocks)} blocks")
        return None

    def _overflows(self, order: Migrate, num_tokens: int) -> bool:
        return blocks_for(num_tokens, self._layout.block_tokens) > len(order.dst_blocks)

    # --- on the way ---------------------------------------------------------------------------------

    def stepped(self, now: float) -> list[Action]:
        """Sequences have grown, or were preempted."""
        actions: list[Action] = []
        for departure in list(self._leaving.values()) if self._leaving else ():
            run = departure.run
            if run is None or departure.stage is not _Stage.COPYING:
                continue
            if run.stage is not Stage.RUNNING or run.remaining != 1:
                actions += self._fail(departure, Overloaded(f"attempt {run.attempt} was preempted"), now)
            elif self._overflows(departure.order, len(run.tokens)):
                actions += self._hand_over(departure, run, now)
        return actions

    def push_ended(self, event: PushEnded, now: float) -> list[Action]:
        departure = self._pushes.pop(event.id, None) if event.terminal else self._pushes.get(event.id)
        if departure is None:
            return self._last_words.ended(event)
        departure.pushes.ended(event, now)
        if departure.pushes.error is not None:
            peer = departure.order.decode_worker
            return self._fail(
                departure, TransferError(f"push to {peer} failed: {departure.pushes.error}"), now
            )
        run = departure.run
        if departure.stage is _Stage.COPYING and run is not None and departure.pushes.settled:
            return self._hand_over(departure, run, now)
        return self._settle(departure, now)

    def _hand_over(self, departure: _Departure, run: DecodeRun, now: float) -> list[Action]:
        """Pause it; what was not pushed yet goes with everything the target needs to go on."""
        self._batch.pause(run)
        departure.stage, departure.paused_at, departure.handover_sent = _Stage.AWAY, now, True
        order, spec = departure.order, run.spec
        last = blocks_for(run.computed, self._layout.block_tokens)
        # At least one block carries the note; the last one is never in the target's cache.
        blocks = range(min(departure.pushed_blocks, last - 1), last)
        departure.pushed_blocks = last
        size_bytes = len(blocks) * self._layout.block_bytes
        first = order.num_tokens - spec.num_prompt_tokens - spec.num_output_tokens
        handover = Handover(
            version=HANDOVER_VERSION,
            attempt=order.to,
            num_tokens=run.computed,
            num_pushes=departure.pushes.num_submitted + 1,
            bytes_moved=departure.pushes.bytes_planned + size_bytes,
            first_token=run.tokens[-1],
            logprobs=run.logprobs[-1] if run.logprobs else None,
            tokens=run.tokens[order.num_tokens : -1],
            token_logprobs=run.logprobs[first:-1] if run.logprobs else [],
        )
        return [self._push(departure, run, blocks, now, handover)]

    def _push(
        self, departure: _Departure, run: DecodeRun, blocks: range, now: float, handover: Handover | None
    ) -> SubmitPush:
        order, book = departure.order, departure.pushes
        note = PushNote(attempt=order.to, sequence=book.num_submitted, handover=handover)
        push = Push(
            id=next(self._ids),
            peer=order.decode_worker,
            group=0,
            src_blocks=tuple(run.blocks[i] for i in blocks),
            dst_blocks=tuple(order.dst_blocks[i] for i in blocks),
            layers=(0, self._layout.group.num_layers),
            note=encode(note),
            deadline=now + order.transfer_deadline_s,
            flow=str(order.to),
            peer_epoch=order.decode_epoch,
        )
        book.submitted(push, len(blocks) * self._layout.block_bytes)
        self._pushes[push.id] = departure
        return SubmitPush(push)

    # --- ends ---------------------------------------------------------------------------------------

    def cancel(self, owner: OwnerId, to: AttemptId, now: float) -> list[Action]:
        """It does not run there, and will not: it goes on here, if it has not ended."""
        if to in self._last_words:
            self._last_words.ask(to, owner)
            return []
        departure = self._of[to]
        if departure.owner != owner and departure.owner_lost:
            # Another coordinator asks when the target's blocks are safe: it hears the last word.
            departure.owner, departure.owner_lost = owner, False
        if departure.owner != owner:
            # It may be its own coordinator, back before the end of its old connection was noticed here.
            departure.asked_by.append(owner)
            return []
        return self._abandon(departure, now)

    def run_ended(self, run: DecodeRun, now: float) -> list[Action]:
        """It finished, failed, or runs elsewhere by now."""
        departure = self._leaving.pop(run.attempt, None)
        if departure is None:
            return []
        departure.run = None
        if departure.stage is _Stage.COPYING:
            return self._abandon(departure, now)
        return self._settle(departure, now)

    def owner_lost(self, owner: OwnerId) -> None:
        """Before its sequences end."""
        for departure in self._of.values():
            if departure.owner == owner:
                departure.owner_lost = True

    def peer_lost(self, peer: WorkerId, error: PdServeError, now: float, up_to: int | None) -> list[Action]:
        hit = [
            departure
            for departure in self._of.values()
            if departure.order.decode_worker == peer
            and (up_to is None or departure.order.decode_epoch <= up_to)
        ]
        return [action for departure in hit for action in self._fail(departure, error, now)]

    def _fail(self, departure: _Departure, error: PdServeError, now: float) -> list[Action]:
        """Tell once, and go on here."""
        tell = departure.stage is not _Stage.FAILED and not departure.said
        told = [Send(departure.owner, attempt_failed(departure.order.to, error))] if tell else []
        return [*told, *self._abandon(departure, now)]

    def _abandon(self, departure: _Departure, now: float) -> list[Action]:
        run, departure.run = departure.run, None
        if run is not None:
            del self._leaving[run.attempt]
            run.leaving = False
            if run.stage is Stage.MOVING:
                self._batch.join(run)
        departure.stage = _Stage.FAILED
        return self._settle(departure, now)

    def _settle(self, departure: _Departure, now: float) -> list[Action]:
        """The last word, once the last push is terminal."""
        if departure.stage is _Stage.COPYING or not departure.pushes.settled:
            return []
        actions: list[Action] = [] if departure.said else [self._last_word(departure, now)]
        departure.said = True
        to = departure.order.to
        for owner in departure.asked_by:
            if to in self._last_words:
                self._last_words.ask(to, owner)
            else:
                actions.append(Send(owner, PushesSettled(attempt=to)))
        departure.asked_by.clear()
        # Paused here until the coordinator has heard that it runs there, or will not.
        if departure.run is None:
            self._of.pop(departure.order.to, None)
        return actions

    def _last_word(self, departure: _Departure, now: float) -> Action:
        order, book = departure.order, departure.pushes
        if departure.stage is _Stage.FAILED or book.error is not None:
            if departure.owner_lost and not departure.handover_sent:
                return self._nothing_more(order, now)
            return Send(departure.owner, PushesSettled(attempt=order.to))
        done = TransferDone(
            attempt=order.to,
            bytes_moved=book.bytes_moved,
            exposed_s=max(0.0, (book.last_end or 0.0) - departure.paused_at),
            busy_s=book.busy_s,
            path=self._peers.path(order.decode_worker).value,
        )
        return Send(departure.owner, done)

    def _nothing_more(self, order: Migrate, now: float) -> SubmitPush:
        """Tell the target itself, as no coordinator relays it; without a hand-over it awaits every byte."""
        push = Push(
            id=next(self._ids),
            peer=order.decode_worker,
            group=0,
            src_blocks=(BlockId(0),),
            dst_blocks=(order.dst_blocks[-1],),
            layers=(0, 1),
            note=encode(PushesSettled(attempt=order.to)),
            deadline=now + order.transfer_deadline_s,
            flow=str(order.to),
            peer_epoch=order.decode_epoch,
        )
        return self._last_words.say(order.to, push)
