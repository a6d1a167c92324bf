"""A small model guesses (Leviathan et al. 2023), with the very random numbers that the target will use.

With the same (seed, position) number and distributions that are alike, the inverse of the cumulative
distribution is mostly the same token: so a sampled answer is guessed nearly as well as a greedy one.

Its KV is its own, in a pool of its own, and belongs to this worker alone: after a hand-over or a migration
it reads the sequence again, in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from decode.run import DecodeRun, Turn
from pdserve.core.errors import ConfigError
from pdserve.core.ids import AttemptId, BlockId
from pdserve.core.layout import blocks_for
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Logits, Sampled, SampleRequest, SequenceSlice
from pdserve.engine.block_pool import BlockPool, Holder, HolderKind
from pdserve.worker.ports import EnginePort


@dataclass(slots=True)
class _Shadow:
    """One sequence as the small model has it."""

    holder: Holder
    params: SamplingParams
    blocks: list[BlockId] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    """Tokens whose KV is in the blocks; the last ones may be guesses that did not hold."""
    agreed: int = 0
    """Of these, known to be the sequence's."""

    def align(self, tokens: Sequence[int]) -> int:
        """Drop what the sequence turned out not to have; where to go on, which is before its newest token."""
        while self.agreed < min(len(self.fed), len(tokens) - 1) and (
            self.fed[self.agreed] == tokens[self.agreed]
        ):
            self.agreed += 1
        del self.fed[self.agreed :]
        return self.agreed


class DraftModel:
    """A `Drafter`. `fill` computes, on the thread of the worker's steps."""

    def __init__(self, engine: EnginePort, *, vocab_size: int, max_num_batched_tokens: int) -> None:
        """vocab_size: the target's. max_num_batched_tokens: read in one step at most, to catch up.

        Raises `ConfigError` where the vocabularies differ.
        """
        if engine.sampler.vocab_size != vocab_size:
            raise ConfigError(
                f"the draft model has a vocabulary of {engine.sampler.vocab_size}, the target of {vocab_size}"
            )
        self._engine, self._budget = engine, max_num_batched_tokens
        self._pool = BlockPool(engine.num_blocks)
        self._of: dict[AttemptId, _Shadow] = {}

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    def limit(self, run: DecodeRun, wanted: int) -> int:
        shadow = self._of.get(run.attempt)
        if shadow is None:
            shadow = self._of[run.attempt] = _Shadow(
                holder=Holder(HolderKind.COMPUTE, run.attempt),
                params=replace(run.spec.sampling, logprobs=None, prompt_logprobs=None),
            )
        # The last guess is not computed.
        wanted = min(wanted, self._engine.runner.max_model_len - len(run.tokens) + 1)
        missing = blocks_for(len(run.tokens) + wanted - 1, self._engine.block_tokens) - len(shadow.blocks)
        if missing > self._pool.num_free:
            return 0
        if missing > 0:
            shadow.blocks += self._pool.allocate(missing, shadow.holder)
        return max(wanted, 0)

    def fill(self, turns: Sequence[Turn]) -> None:
        behind = {turn.run.attempt: self._of[turn.run.attempt].align(turn.run.tokens) for turn in turns}
        budget = max(self._budget, len(turns))
        begun: list[Turn] = []
        slices: list[SequenceSlice] = []
        for turn in sorted(turns, key=lambda t: len(t.run.tokens) - behind[t.run.attempt]):
            shadow, tokens = self._of[turn.run.attempt], turn.run.tokens
            chunk = tokens[len(shadow.fed) : len(shadow.fed) + budget]
            if not chunk:
                break
            caught_up = len(shadow.fed) + len(chunk) == len(tokens)
            slices.append(self._slice(shadow, chunk, Logits.LAST if caught_up else Logits.NONE))
            budget -= len(chunk)
            if caught_up:
                begun.append(turn)
        self._guess(slices, begun)

    def forget(self, attempt: AttemptId) -> None:
        shadow = self._of.pop(attempt, None)
        if shadow is not None:
            self._pool.release_all(shadow.blocks, shadow.holder)

    def _guess(self, slices: list[SequenceSlice], turns: list[Turn]) -> None:
        while slices:
            logits_NV = self._engine.runner.forward(slices)
            # Sequences that still catch up have no row.
            results = (
                self._engine.sampler.sample(logits_NV, [self._request(t) for t in turns]) if turns else []
            )
            going_on: list[Turn] = []
            for turn, result in zip(turns, results, strict=True):
                if isinstance(result, Sampled):
                    turn.drafts.append(result.token)
                    if len(turn.drafts) < turn.depth:
                        going_on.append(turn)
            turns = going_on
            slices = [
                self._slice(self._of[turn.run.attempt], [turn.drafts[-1]], Logits.LAST) for turn in turns
            ]

    def _slice(self, shadow: _Shadow, tokens: list[int], logits: Logits) -> SequenceSlice:
        start = len(shadow.fed)
        shadow.fed += tokens
        return SequenceSlice(tokens=tokens, start=start, blocks=shadow.blocks, logits=logits)

    def _request(self, turn: Turn) -> SampleRequest:
        spec = turn.run.spec
        return SampleRequest(
            params=self._of[spec.attempt].params,
            tokens=turn.run.tokens + turn.drafts,
            num_prompt_tokens=spec.num_prompt_tokens,
            eos_token_ids=spec.eos_token_ids,
        )
