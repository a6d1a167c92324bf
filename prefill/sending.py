"""Makes the pushes of every attempt, with what each carries. Pure: the worker submits them."""

from __future__ import annotations

from collections.abc import Iterator

from kvtransfer.protocol import Push, PushEnded
from pdserve.core.codec import encode
from pdserve.core.handover import HANDOVER_VERSION, Handover, PushNote
from pdserve.core.ids import BlockId
from pdserve.core.layout import GroupLayout
from pdserve.core.messages import PushesSettled
from pdserve.engine.batch import Sampled
from pdserve.worker.events import SubmitPush
from prefill.pushes import blocks_to_push
from prefill.run import Chunk, PrefillPlan, PrefillRun


class PushMaker:
    """Numbers pushes and knows whose they are."""

    def __init__(self, layout: GroupLayout, push_ids: Iterator[int]) -> None:
        self._layout = layout
        self._ids = push_ids
        self._of: dict[int, PrefillRun] = {}

    def owner(self, event: PushEnded) -> PrefillRun | None:
        """Whose push it was; forgotten with its terminal event."""
        return self._of.pop(event.id, None) if event.terminal else self._of.get(event.id)

    def cached_prefix(self, run: PrefillRun, now: float) -> list[SubmitPush]:
        """What an earlier prompt left here and the decode worker lacks: all layers at once."""
        blocks = blocks_to_push(
            start=0,
            end=run.computed,
            final=False,
            dst_cached_tokens=run.request.dst_cached_tokens,
            block_tokens=self._layout.block_tokens,
        )
        return [self._push(run, blocks, (0, self._layout.group.num_layers), now)] if blocks else []

    def layers(self, plan: PrefillPlan, first: int, last: int, now: float) -> list[SubmitPush]:
        """Layers [first, last) of every chunk of a step, but for what must wait for the first token."""
        is_last_group = last == self._layout.group.num_layers
        if is_last_group:
            plan.held_back = (first, last)
        pushes = []
        for chunk in plan.chunks:
            blocks = self._blocks_of(chunk)
            if blocks and not (is_last_group and chunk.final):
                pushes.append(self._push(chunk.run, blocks, (first, last), now))
        return pushes

    def handover(self, chunk: Chunk, layers: tuple[int, int], sampled: Sampled, now: float) -> SubmitPush:
        """The layers held back, with everything the decode worker needs to go on."""
        run, blocks = chunk.run, self._blocks_of(chunk)
        handover = Handover(
            version=HANDOVER_VERSION,
            attempt=run.attempt,
            num_tokens=run.num_tokens,
            num_pushes=run.pushes.num_submitted + 1,
            bytes_moved=run.pushes.bytes_planned + self._size_bytes(blocks, layers),
            first_token=sampled.token,
            logprobs=sampled.logprobs,
        )
        return self._push(run, blocks, layers, now, handover)

    def settling(self, run: PrefillRun, now: float) -> Push:
        """Tell the decode worker that nothing of an attempt is to come, when no coordinator relays it.

        Without a hand-over it can only have its blocks in quarantine or wait for more, so one of them takes
        whatever bytes carry the note. (With one it may be running, or over: then nothing may be written.)
        """
        return Push(
            id=next(self._ids),
            peer=run.request.decode_worker,
            group=0,
            src_blocks=(BlockId(0),),
            dst_blocks=(run.request.dst_blocks[-1],),
            layers=(0, 1),
            note=encode(PushesSettled(attempt=run.attempt)),
            deadline=now + run.request.transfer_deadline_s,
            flow=str(run.attempt),
            peer_epoch=run.request.decode_epoch,
        )

    def _blocks_of(self, chunk: Chunk) -> range:
        return blocks_to_push(
            start=chunk.start,
            end=chunk.end,
            final=chunk.final,
            dst_cached_tokens=chunk.run.request.dst_cached_tokens,
            block_tokens=self._layout.block_tokens,
        )

    def _size_bytes(self, blocks: range, layers: tuple[int, int]) -> int:
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
            id=next(self._ids),
            peer=run.request.decode_worker,
            group=0,
            src_blocks=tuple(run.blocks[i] for i in blocks),
            dst_blocks=tuple(run.request.dst_blocks[i] for i in blocks),
            layers=layers,
            note=encode(note),
            deadline=now + run.request.transfer_deadline_s,
            flow=str(run.attempt),
            peer_epoch=run.request.decode_epoch,
        )
        run.pushes.submitted(push, self._size_bytes(blocks, layers))
        self._of[push.id] = run
        return SubmitPush(push)
