"""Which prompts are read next, and how much of each: chunks under a token budget, most urgent first. Pure.

A prompt takes blocks for all of its tokens when it begins, so that two half-read prompts never wait for each
other.
"""

from __future__ import annotations

import bisect

from pdserve.core.layout import blocks_for
from pdserve.engine.block_pool import BlockPool
from pdserve.engine.prefix_cache import BlockHash, PrefixCache
from pdserve.worker.tiering import Tiering
from prefill.run import Chunk, PrefillRun, Stage


class PromptQueue:
    """Prompts that wait and prompts that are being read, in order of urgency."""

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache,
        tiering: Tiering,
        *,
        block_tokens: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        gather_tokens: int | None = None,
    ) -> None:
        self._pool, self._cache, self._tiering = pool, cache, tiering
        self._gather_tokens = gather_tokens
        self._block_tokens = block_tokens
        # A chunk is at least a block, or a long prompt would never advance.
        self._budget = max(max_num_batched_tokens, block_tokens)
        self._max_num_seqs = max_num_seqs
        self._runs: list[PrefillRun] = []

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def num_waiting(self) -> int:
        return sum(1 for run in self._runs if run.stage is Stage.WAITING)

    @property
    def num_computing(self) -> int:
        return sum(1 for run in self._runs if run.stage is Stage.COMPUTING)

    @property
    def uncomputed_tokens(self) -> int:
        return sum(run.num_tokens - run.computed for run in self._runs)

    def add(self, run: PrefillRun) -> None:
        bisect.insort(self._runs, run, key=lambda r: r.urgency)

    def leave(self, run: PrefillRun) -> None:
        """It computes no more: its blocks are given back, as far as no push reads them."""
        self._runs.remove(run)
        self._pool.release_all(run.blocks, run.holder)
        run.stage = Stage.SETTLING

    def schedule(
        self, tokens_per_s: float, budget: int | None = None
    ) -> tuple[list[Chunk], list[PrefillRun]]:
        """Chunks of the next step, and the prompts that begin with it.

        tokens_per_s: how fast prompts were read of late, 0 where that is not known. budget: tokens of the
        step, where there are to be fewer than usual.

        A prompt that begins like one before it, which is being read, waits for that one's blocks instead of
        computing the same ones beside it.
        """
        chunks: list[Chunk] = []
        begun: list[PrefillRun] = []
        budget, seats = min(budget or self._budget, self._budget), self._max_num_seqs - self.num_computing
        full, read = False, 0
        coming: set[BlockHash] = set()
        for run in self._runs:
            if self._gather_tokens is not None and read >= self._gather_tokens:
                break
            if run.stage is Stage.WAITING:
                if self._begins_like(run, coming):
                    continue
                if not full and self._awaits_tiers(run, tokens_per_s):
                    continue  # what comes from below does not hold up the others
                # No skipping ahead: a long prompt would starve behind short ones that keep fitting.
                full = full or seats <= 0 or not self._admit(run, budget)
                if full:
                    continue
                seats -= 1
                begun.append(run)
            if self._cache.enabled:
                coming.update(run.hashes.of(run.spec.tokens)[run.computed // self._block_tokens :])
            end = self._chunk_end(run, run.computed, budget)
            if end is None:
                break
            chunks.append(self._chunk(run, end))
            budget -= end - run.computed
            read += end - run.computed
        return chunks, begun

    def remember(self, chunk: Chunk) -> None:
        """Keep the chunk's full blocks for prompts that begin alike."""
        run, size = chunk.run, self._block_tokens
        hashes = run.hashes.of(run.spec.tokens)
        for index in range(chunk.start // size, chunk.end // size):
            self._cache.insert(hashes[index], run.blocks[index])

    def _begins_like(self, run: PrefillRun, coming: set[BlockHash]) -> bool:
        """The first block that it lacks is about to be computed for a more urgent prompt."""
        if not coming:
            return False
        hashes = self._usable_hashes(run)[: (run.num_tokens - 1) // self._block_tokens]
        cached = len(self._cache.lookup(hashes, run.num_tokens))
        return cached < len(hashes) and hashes[cached] in coming

    def _awaits_tiers(self, run: PrefillRun, tokens_per_s: float) -> bool:
        """A part of its prefix is on its way into the pool, from host memory or disk."""
        if run.fetch is None:
            run.fetch = self._tiering.fetch(self._usable_hashes(run), run.num_tokens, tokens_per_s)
        return run.fetch is not None and not run.fetch.done

    def _admit(self, run: PrefillRun, budget: int) -> bool:
        """Take blocks for the whole prompt, the cached prefix first; False when there are not enough, or when
        this step has no tokens left for it: by the next one, more of its prefix may be cached."""
        hashes = self._usable_hashes(run)
        cached = len(self._cache.lookup(hashes, run.num_tokens)) * self._block_tokens
        if self._chunk_end(run, cached, budget) is None:
            return False
        taken = self._cache.reserve(
            hashes,
            run.num_tokens,
            total=blocks_for(run.num_tokens, self._block_tokens),
            cached_holder=run.holder,
            fresh_holder=run.holder,
        )
        if taken is None:
            return False
        run.blocks = [*taken.cached, *taken.fresh]
        run.computed = len(taken.cached) * self._block_tokens
        run.stage = Stage.COMPUTING
        return True

    def _usable_hashes(self, run: PrefillRun) -> list[BlockHash]:
        """None when prompt logprobs are wanted: they need every position computed."""
        return run.hashes.of(run.spec.tokens) if run.num_prompt_logprobs is None else []

    def _chunk_end(self, run: PrefillRun, start: int, budget: int) -> int | None:
        """As much of the prompt as the budget allows; up to a block boundary unless it is all of it."""
        end = min(run.num_tokens, start + budget)
        if end < run.num_tokens:
            end -= end % self._block_tokens
        return end if end > start else None

    def _chunk(self, run: PrefillRun, end: int) -> Chunk:
        size = self._block_tokens
        for block in run.blocks[run.computed // size : blocks_for(end, size)]:
            self._pool.require_writable(block, run.holder)
        return Chunk(run, run.computed, end)
