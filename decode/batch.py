"""Who takes part in the next step: continuous batching, growth, preemption, and prompts read in between.

Pure. A sequence takes a block when its next token needs one. When there is none, the least urgent one gives
up all of its blocks and is computed again later: the same tokens, because randomness is keyed by position.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from decode.pace import Pace
from decode.run import DecodePlan, DecodeRun, Stage, Turn
from decode.speculation import Speculation
from pdserve.core.errors import BlockPoolExhausted
from pdserve.core.ids import AttemptId
from pdserve.core.layout import blocks_for
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.prefix_cache import PrefixCache


class Batch:
    """The sequences that compute here, most urgent first, and the blocks they take."""

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache,
        *,
        block_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        speculation: Speculation | None = None,
        gather_tokens: int | None = None,
    ) -> None:
        self._pool, self._cache, self._speculation = pool, cache, speculation
        self._gather_tokens = gather_tokens
        self._block_tokens = block_tokens
        self._max_num_seqs, self._budget = max_num_seqs, max_num_batched_tokens
        self.pace = Pace(budget=max_num_batched_tokens, block_tokens=block_tokens)
        self._running: list[DecodeRun] = []
        self._preempted: list[DecodeRun] = []
        self._paused: set[AttemptId] = set()
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._paused)

    @property
    def num_preempted(self) -> int:
        return len(self._preempted)

    @property
    def context_tokens(self) -> int:
        return sum(run.computed for run in self._running)

    @property
    def spare_blocks(self) -> int:
        """Left free by newcomers: those that run soon need their next one."""
        return min(len(self._running), 1 + len(self._running) // 8)

    def join(self, run: DecodeRun) -> None:
        """A sequence with blocks, all held for computing."""
        self._paused.discard(run.attempt)
        run.stage = Stage.RUNNING
        bisect.insort(self._running, run, key=lambda r: r.urgency)

    def pause(self, run: DecodeRun) -> None:
        """It computes nothing and keeps its blocks, until it joins again or leaves."""
        self._running.remove(run)
        self._paused.add(run.attempt)
        run.stage = Stage.MOVING

    def leave(self, run: DecodeRun) -> None:
        """It ended: its blocks are given back, full ones stay in the cache while there is room."""
        if run.stage is Stage.MOVING:
            self._paused.remove(run.attempt)
        else:
            (self._running if run.stage is Stage.RUNNING else self._preempted).remove(run)
        self._pool.release_all(run.blocks, run.computing)
        run.blocks = []

    def schedule(self, now: float, *, alone: bool) -> DecodePlan | None:
        """The next step: one token of every sequence that decodes, then chunks of those that read.

        alone: nothing else is computed in it. Guesses are made in steps that only decode.
        """
        preempted_before = self.num_preemptions
        turns = list(self._decoding())
        if self.num_preemptions == preempted_before:
            self._resume_preempted()
        reading = list(self._reading([turn.run for turn in turns]))
        if turns and alone and not reading and self._speculation is not None:
            self._speculation.plan(turns, self._room, self._budget - len(turns))
        turns += reading
        return DecodePlan(turns, now, alone=alone) if turns else None

    def remember(self, run: DecodeRun) -> None:
        """Offer the blocks that are full by now to the prefix cache."""
        full = run.computed // self._block_tokens
        if full > run.remembered:
            hashes = run.hashes.of(run.tokens[: full * self._block_tokens])
            for index in range(run.remembered, full):
                self._cache.insert(hashes[index], run.blocks[index])
            run.remembered = full

    def _decoding(self) -> Iterator[Turn]:
        taken = 0
        for run in list(self._running):
            if taken == self._max_num_seqs:
                return
            # An earlier one in this round may have preempted it.
            if run.stage is Stage.RUNNING and run.remaining == 1 and self._grow(run):
                taken += 1
                yield self._turn(run, len(run.tokens))

    def _grow(self, run: DecodeRun) -> bool:
        """Room for its newest token; False when it had to give way itself."""
        while blocks_for(len(run.tokens), self._block_tokens) > len(run.blocks):
            try:
                run.blocks += self._cache.allocate(1, run.computing)
            except BlockPoolExhausted:
                victim = self._running[-1]
                self._preempt(victim)
                if victim is run:
                    return False
        return True

    def _room(self, run: DecodeRun, wanted: int) -> int:
        """How many guesses after its newest token its blocks take, with those it can have without harm."""
        size = self._block_tokens
        missing = blocks_for(len(run.tokens) + wanted, size) - len(run.blocks)
        if missing > 0 and self._pool.num_available - missing >= self.spare_blocks:
            run.blocks += self._cache.allocate(missing, run.computing)
        room = min(wanted, len(run.blocks) * size - len(run.tokens))
        for index in range(run.computed // size, blocks_for(len(run.tokens) + room, size)):
            self._pool.require_writable(run.blocks[index], run.computing)
        return room

    def _preempt(self, run: DecodeRun) -> None:
        self._running.remove(run)
        self._pool.release_all(run.blocks, run.computing)
        run.blocks, run.computed, run.remembered = [], 0, 0
        run.prompt_logprobs.clear()
        run.stage = Stage.PREEMPTED
        self.num_preemptions += 1
        bisect.insort(self._preempted, run, key=lambda r: r.urgency)

    def _resume_preempted(self) -> None:
        """Give blocks back to those that lost them, in order of urgency, as long as there are enough."""
        while self._preempted:
            run = self._preempted[0]
            # One token more than it has, or it would be the next victim at once.
            total = min(blocks_for(len(run.tokens) + 1, self._block_tokens), self._pool.num_blocks)
            taken = self._cache.reserve(
                run.hashes.of(run.tokens) if run.num_prompt_logprobs is None else [],
                len(run.tokens),
                total=total,
                spare=self.spare_blocks,
                cached_holder=run.computing,
                fresh_holder=run.computing,
            )
            if taken is None:
                return
            self._preempted.pop(0)
            run.blocks = [*taken.cached, *taken.fresh]
            run.remembered = len(taken.cached)
            run.computed = len(taken.cached) * self._block_tokens
            self.join(run)

    def _reading(self, answers: Sequence[DecodeRun]) -> Iterator[Turn]:
        """Chunks of prompts, as much as is left beside the answers."""
        budget = self.pace.prompt_tokens(answers)
        seats, read = self._max_num_seqs - len(answers), 0
        readers = [run for run in self._running if run.remaining > 1]
        for run in sorted(readers, key=lambda r: r.spec.ttft_deadline or float("inf")):
            end = min(len(run.tokens), run.computed + budget)
            if end < len(run.tokens):
                end -= end % self._block_tokens
            if end <= run.computed or seats <= 0:
                return
            seats -= 1
            budget -= end - run.computed
            read += end - run.computed
            yield self._turn(run, end)
            if self.gathered(read):
                return

    def gathered(self, read: int) -> bool:
        """A step that reads so many tokens of prompts takes no further prompt in."""
        return self._gather_tokens is not None and read >= self._gather_tokens

    def _turn(self, run: DecodeRun, end: int) -> Turn:
        size = self._block_tokens
        for index in range(run.computed // size, blocks_for(end, size)):
            self._pool.require_writable(run.blocks[index], run.computing)
        return Turn(run, run.computed, end, final=end == len(run.tokens))
