"""One attempt on a prefill worker, and the plan of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pdserve.core.ids import AttemptId, BlockId
from pdserve.core.messages import RequestSpec, StartPrefill
from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import SampleRequest, SequenceSlice
from pdserve.engine.block_pool import Holder, HolderKind
from pdserve.engine.prefix_cache import PrefixHashes
from pdserve.worker.compute import PromptLogprobs, Work, slice_logits
from pdserve.worker.events import OwnerId
from pdserve.worker.pushes import PushBook
from pdserve.worker.tiering import Fetch
from pdserve.worker.urgency import Urgency


class Stage(Enum):
    WAITING = "waiting"
    """Holds no blocks yet."""
    COMPUTING = "computing"
    """Holds blocks for its whole prompt."""
    SETTLING = "settling"
    """Computes no more; some pushes are not terminal."""


@dataclass(slots=True, kw_only=True, eq=False)
class PrefillRun:
    owner: OwnerId
    request: StartPrefill
    urgency: Urgency
    received: float
    hashes: PrefixHashes
    pushes: PushBook
    stage: Stage = Stage.WAITING
    fetch: Fetch | None = None
    """What it waits for from the tiers below the pool; None: not asked yet."""
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is in the blocks."""
    handed_over: bool = False
    """The hand-over is under way, and nothing has gone wrong since."""
    handover_sent: bool = False
    owner_lost: bool = False
    asked_by: list[OwnerId] = field(default_factory=list)
    """Coordinators, besides its own, that want to know when nothing can land any more."""
    compute_s: float = 0.0
    compute_end: float = 0.0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def attempt(self) -> AttemptId:
        return self.request.spec.attempt

    @property
    def spec(self) -> RequestSpec:
        return self.request.spec

    @property
    def num_tokens(self) -> int:
        return len(self.request.spec.tokens)

    @property
    def holder(self) -> Holder:
        return Holder(HolderKind.COMPUTE, self.attempt)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Wanted of the prompt, once: a later attempt of the same request has streamed them already."""
        return self.spec.sampling.prompt_logprobs if self.spec.num_output_tokens == 0 else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one prompt, in one step."""

    run: PrefillRun
    start: int
    end: int

    @property
    def final(self) -> bool:
        return self.end == self.run.num_tokens

    def work(self) -> Work:
        """What the engine is asked for: a token where the chunk is final, prompt logprobs where wanted."""
        run, spec = self.run, self.run.spec
        tokens, count = spec.tokens, run.num_prompt_logprobs
        return Work(
            slice=SequenceSlice(
                tokens=tokens[self.start : self.end],
                start=self.start,
                blocks=run.blocks,
                logits=slice_logits(final=self.final, prompt_logprobs=count),
            ),
            sample=SampleRequest(
                params=spec.sampling,
                tokens=tokens,
                num_prompt_tokens=spec.num_prompt_tokens,
                eos_token_ids=spec.eos_token_ids,
            )
            if self.final
            else None,
            prompt_logprobs=None
            if count is None
            else PromptLogprobs(tokens[self.start + 1 : self.end + 1], count),
        )


@dataclass(slots=True)
class PrefillPlan:
    """One step: chunks in the order of urgency."""

    chunks: list[Chunk]
    started: float
    held_back: tuple[int, int] | None = None
    """Layers that final chunks have not pushed yet: they wait for the first token."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)
