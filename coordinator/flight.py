"""One sample on its way: its record, its current attempt, and the times it will be judged by."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from coordinator.account import Leg, Marks
from coordinator.breakdown import after_first_token, before_first_token, longest
from coordinator.decisions import Placement
from coordinator.events import NewRequest
from coordinator.report import Report, exceeds
from coordinator.sla import Forecast, Goal
from coordinator.stories import Story
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.lifecycle import Phase, RequestRecord
from pdserve.core.messages import FinishReason, PrefillDone, RequestSpec, TransferDone
from pdserve.core.prefix import PrefixHashes


@dataclass(slots=True, kw_only=True)
class Attempt:
    """What one attempt has come to. A new one starts with a new object, so nothing leaks between them."""

    id: AttemptId
    placement: Placement
    base: int
    """Output tokens that earlier attempts had given."""
    prefill_queue_s: float = 0.0
    cached_tokens: int = 0
    prefill_sent: bool = False
    prefill_done: PrefillDone | None = None
    kv_arrived: bool = False
    transfer: TransferDone | None = None
    marks: Marks = field(default_factory=Marks)
    read_by: WorkerId | None = None
    """Who read the prompt of a request that has moved since."""

    @property
    def decode(self) -> WorkerId:
        return self.placement.decode.worker

    @property
    def prefill(self) -> WorkerId | None:
        return None if self.placement.prefill is None else self.placement.prefill.worker


@dataclass(slots=True, kw_only=True)
class Flight:
    request: NewRequest
    record: RequestRecord
    order: int
    leader: RequestId | None = None
    """The first sample of the same prompt, while this one waits for it."""
    prefer: Placement | None = None
    attempt: Attempt | None = None
    """None: waiting for a placement."""
    output: list[int] = field(default_factory=list)
    failed_on: set[WorkerId] = field(default_factory=set)
    idle_refusals: int = 0
    retries: int = 0
    moving: Attempt | None = None
    """The attempt it will be once it has moved to another decode worker."""
    move_after: float = 0.0
    migrations: int = 0
    submitted: float = 0.0
    """When it was taken in: validated and tokenised."""
    legs: list[Leg] = field(default_factory=list)
    """Of the attempts that have ended."""
    preemptions: int = 0
    story: Story | None = None
    """What is kept for who asks later. None: nothing is."""
    tag: float | None = None
    """Its turn among the tenants of its priority; the same when it comes back to the queue."""
    charged: float | None = None
    """Tokens that were counted as its tenant's use. None: it was never admitted."""
    room_check_at: float = -math.inf
    """When it is worth asking again whether others shall give way to it."""
    asked_to_go_at: float = -math.inf
    """When its worker was asked last to interrupt it."""
    prefix_at: WorkerId | None = None
    """A prefill worker that read its prompt in an earlier attempt, and likely has it in its cache."""
    prefix_hashes: PrefixHashes | None = None
    """Of its tokens, by the block size of its model's decode workers."""
    prompt_logprobs_sent: bool = False
    first_token_at: float | None = None
    last_token_at: float | None = None
    predicted: Forecast | None = None
    """TTFT from arrival, and TPOT, as predicted when it was placed first."""
    ending: FinishReason | None = None
    """All output is out; only the figures of its transfer are awaited."""

    @property
    def id(self) -> RequestId:
        return self.request.id

    def note(self, at: float, text: str) -> None:
        """For who asks later what happened to it."""
        if self.story is not None:
            self.story.note(at, text)

    @property
    def attempts(self) -> int:
        """How often its prompt was read, or began to be."""
        return self.retries + 1

    @property
    def num_tokens(self) -> int:
        return len(self.request.tokens) + len(self.output)

    @property
    def due(self) -> float:
        """When its first token is due, on the registry's clock."""
        target = self.request.ttft_target_s
        return math.inf if target is None else self.request.arrived + target

    def goal(self, now: float) -> Goal:
        target = None if self.request.ttft_target_s is None or self.output else self.due - now
        left = max(self.request.sampling.max_tokens - len(self.output), 1)
        return Goal(ttft_s=target, tpot_s=self.request.tpot_target_s, due=self.due, answer_tokens=left)

    def predict(self, forecast: Forecast | None, now: float) -> None:
        """Kept from the first placement, for comparison with what it comes to."""
        if forecast is not None and self.predicted is None:
            waited = now - self.request.arrived
            self.predicted = Forecast(waited + forecast.ttft_s, forecast.tpot_s)

    def awaits_kv(self) -> bool:
        return self.record.phase in (Phase.PREFILLING, Phase.TRANSFERRING)

    def spec(self) -> RequestSpec:
        """For the current attempt: the prompt and everything that was streamed already."""
        request = self.request
        sampling = request.sampling
        if self.prompt_logprobs_sent:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        target = request.ttft_target_s
        return RequestSpec(
            attempt=self.record.attempt_id,
            tokens=request.tokens + self.output if self.output else request.tokens,
            num_prompt_tokens=len(request.tokens),
            sampling=sampling,
            eos_token_ids=request.eos_token_ids,
            cache_salt=request.cache_salt,
            arrival=request.arrival,
            ttft_deadline=None if target is None else request.arrival + target,
            priority=request.priority,
            tpot_target_s=request.tpot_target_s,
        )

    def _blamed(self, ttft_s: float | None, tpot_s: float | None, prefill_queue_s: float) -> tuple[str, str]:
        """What took longest where its TTFT and its TPOT target were missed; empty where they were met."""
        ttft, tpot, history = "", "", self.record.history
        if self.first_token_at is None or self.last_token_at is None:
            return ttft, tpot
        if exceeds(ttft_s, self.request.ttft_target_s):
            ttft = longest(before_first_token(history, self.first_token_at, prefill_queue_s=prefill_queue_s))
        if exceeds(tpot_s, self.request.tpot_target_s):
            tpot = longest(after_first_token(history, self.first_token_at, self.last_token_at))
        return ttft, tpot

    def add_output(self, tokens: list[int], now: float) -> None:
        self.output.extend(tokens)
        if self.story is not None:
            self.story.output(now, len(tokens))
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now

    def report(self, now: float, phase: Phase = Phase.FINISHED) -> Report:
        """phase: how it ends."""
        request, attempt = self.request, self.attempt
        waited = self.record.seconds_in(Phase.QUEUED, now=now) + self.record.seconds_in(
            Phase.ADMITTED, now=now
        )
        done = None if attempt is None else attempt.prefill_done
        transfer = None if attempt is None else attempt.transfer
        prefill_queue_s = 0.0 if attempt is None else attempt.prefill_queue_s
        ttft_s = None if self.first_token_at is None else self.first_token_at - self.record.created
        tpot_s = self._tpot_s()
        ttft, tpot = self._blamed(ttft_s, tpot_s, prefill_queue_s)
        return Report(
            id=self.id,
            model=request.model,
            tenant=request.tenant,
            priority=request.priority,
            prompt_tokens=len(request.tokens),
            output_tokens=len(self.output),
            attempts=self.attempts,
            migrations=self.migrations,
            legs=tuple(self.legs),
            phase=phase,
            created=self.record.created,
            submitted=self.submitted,
            ended=now,
            first_token_at=self.first_token_at,
            traceparent=request.traceparent,
            sla_class=request.sla_class,
            preemptions=self.preemptions,
            e2e_s=now - self.record.created,
            queue_s=waited + prefill_queue_s,
            prefill_queue_s=prefill_queue_s,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            ttft_target_s=request.ttft_target_s,
            tpot_target_s=request.tpot_target_s,
            ttft_missed_in=ttft,
            tpot_missed_in=tpot,
            predicted_ttft_s=None if self.predicted is None else self.predicted.ttft_s,
            predicted_tpot_s=None if self.predicted is None else self.predicted.tpot_s,
            prefill_s=None if done is None else done.compute_s,
            transfer_exposed_s=None if transfer is None else transfer.exposed_s,
            transfer_busy_s=None if transfer is None else transfer.busy_s,
            bytes_moved=0 if transfer is None else transfer.bytes_moved,
            transfer_path="" if transfer is None else transfer.path,
            cached_tokens=0 if attempt is None else attempt.cached_tokens,
            prefill_worker="" if attempt is None else attempt.prefill or attempt.read_by or "",
            decode_worker="" if attempt is None else attempt.decode,
            placed=None if attempt is None else attempt.placement,
        )

    def _tpot_s(self) -> float | None:
        if self.first_token_at is None or self.last_token_at is None or len(self.output) < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (len(self.output) - 1)
