"""One attempt on a decode worker, and the plan of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from decode.arrivals import Arrivals
from pdserve.core.ids import AttemptId, BlockId, WorkerId
from pdserve.core.messages import RequestSpec
from pdserve.core.sampling import TokenLogprobs
from pdserve.engine.batch import Logits, SampleRequest, SequenceSlice
from pdserve.engine.block_pool import Holder, HolderKind
from pdserve.engine.prefix_cache import PrefixHashes
from pdserve.worker.compute import PromptLogprobs, Work, slice_logits
from pdserve.worker.events import OwnerId
from pdserve.worker.urgency import Urgency


class Stage(Enum):
    RECEIVING = "receiving"
    """Its blocks are reserved; a prefill worker fills them."""
    RUNNING = "running"
    """Has blocks, and tokens to compute: its whole prompt, what preemption threw away, or the newest one."""
    MOVING = "moving"
    """Paused, with its blocks: it goes on at another decode worker, or here if that comes to nothing."""
    PREEMPTED = "preempted"
    """Gave its blocks to another; computes all of its tokens again when there is room."""


@dataclass(frozen=True, slots=True)
class Source:
    """Who fills the blocks."""

    worker: WorkerId
    epoch: int


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeRun:
    owner: OwnerId
    spec: RequestSpec
    urgency: Urgency
    source: Source | None
    """None: this worker reads the prompt itself."""
    received: float
    lease_until: float
    stage: Stage
    ahead: int = 0
    """Its KV may come with this many tokens more than its spec has."""
    hashes: PrefixHashes
    tokens: list[int]
    """Prompt + output so far."""
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is in the blocks."""
    remembered: int = 0
    """Full blocks that were offered to the prefix cache."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    settled: bool = False
    """Its prefill worker has said that nothing more is to come."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the tokens that came after the spec's, where they are wanted: they go along when it moves."""
    leaving: bool = False
    """Its blocks are being copied to another worker: it must not outgrow the room there."""
    reading: bool = False
    """The prompt is being read here, for the first time."""
    began: bool = False
    compute_s: float = 0.0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def attempt(self) -> AttemptId:
        return self.spec.attempt

    @property
    def computing(self) -> Holder:
        return Holder(HolderKind.COMPUTE, self.spec.attempt)

    @property
    def receiving(self) -> Holder:
        return Holder(HolderKind.RECEIVER, self.spec.attempt)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 in plain decoding."""
        return len(self.tokens) - self.computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.spec.num_prompt_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Wanted of the prompt, once: a later attempt of the same request has streamed them already."""
        wanted = self.reading and self.spec.num_output_tokens == 0
        return self.spec.sampling.prompt_logprobs if wanted else None


@dataclass(slots=True)
class Turn:
    """Tokens up to `end` of one sequence, in one step, and guesses at those after it."""

    run: DecodeRun
    start: int
    end: int
    final: bool
    """Its last token is computed, so the next one is sampled."""
    depth: int = 0
    """Guesses wanted."""
    drafts: list[int] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        """It computes the newest token alone, and the guesses after it."""
        return self.final and self.end - self.start == 1 and not self.run.reading

    def work(self) -> Work:
        run = self.run
        count = run.num_prompt_logprobs
        logprobs = None if count is None else PromptLogprobs(run.tokens[self.start + 1 : self.end + 1], count)
        return Work(
            slice=SequenceSlice(
                tokens=run.tokens[self.start : self.end] + self.drafts,
                start=self.start,
                blocks=run.blocks,
                logits=Logits.ALL if self.drafts else slice_logits(final=self.final, prompt_logprobs=count),
            ),
            sample=self._sample_request() if self.final else None,
            drafts=self.drafts,
            prompt_logprobs=logprobs,
        )

    def _sample_request(self) -> SampleRequest:
        spec = self.run.spec
        return SampleRequest(
            params=spec.sampling,
            tokens=self.run.tokens,
            num_prompt_tokens=spec.num_prompt_tokens,
            eos_token_ids=spec.eos_token_ids,
        )


@dataclass(slots=True)
class DecodePlan:
    turns: list[Turn]
    started: float
    alone: bool = True
    """Nothing else was computed in the step."""
    drafting_s: float = 0.0
    """Of the step's time, what guessing took."""
