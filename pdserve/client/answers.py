"""What a request comes back as."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pdserve.core.errors import ProtocolError
from pdserve.core.messages import FinishReason
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import TokenLogprobs

_REASONS: Final = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORT: FinishReason.ABORT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """Over all samples."""
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a sample's time went, in seconds."""

    queue_s: float
    prefill_s: float
    transfer_exposed_s: float
    """From the end of prefill compute to the last block's arrival."""
    ttft_s: float
    tpot_s: float
    """Mean per token after the first."""
    e2e_s: float
    bytes_moved: int
    transfer_path: str
    """cuda_ipc, rdma, shm, tcp, local or fake; empty when nothing was moved."""
    transfer_gb_per_s: float
    prefill_worker: str
    """Empty when the decode worker read the prompt itself."""
    decode_worker: str
    attempts: int
    prefill_queue_s: float = 0.0
    """Waiting at the prefill worker; a part of `queue_s`."""
    preemptions: int = 0
    """How often it was interrupted by more urgent requests."""
    sla_class: str = ""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    """What was asked for, after defaults of its class."""
    ttft_late_s: float | None = None
    tpot_late_s: float | None = None
    """By how much a target was missed; below zero: how much was left."""
    ttft_missed_in: str = ""
    tpot_missed_in: str = ""
    """What took longest where a target was missed: queue, prefill_queue, prefill, transfer, decode, moving or
    retry."""
    ttft_predicted_s: float | None = None
    tpot_predicted_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to one sample. A sample's last one has `finish_reason` and `timings`; the stream's
    last one has `usage` too."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    """None where nothing precedes the token; empty but on one delta, when asked for."""
    finish_reason: FinishReason | None
    matched_stop: str | None
    timings: Timings | None
    usage: Usage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One sample, complete."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    matched_stop: str | None
    timings: Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A complete answer. The properties are those of the first sample, which is all there is for n = 1."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def timings(self) -> Timings:
        return self.choices[0].timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    max_model_len: int
    vocab_size: int
    has_chat_template: bool
    prefill_workers: int
    decode_workers: int
    ready: bool
    aliases: tuple[str, ...] = ()
    """Other names that requests may use."""
    sla_classes: tuple[str, ...] = ()


def delta_from(wire: pb.GenerateDelta) -> Delta:
    return Delta(
        request_id=wire.request_id,
        index=wire.index,
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        logprobs=_logprobs(wire.logprobs),
        prompt_logprobs=_prompt_logprobs(wire.prompt_logprobs),
        finish_reason=_REASONS.get(wire.finish_reason),
        matched_stop=wire.matched_stop if wire.HasField("matched_stop") else None,
        timings=_timings(wire.timings) if wire.HasField("timings") else None,
        usage=_usage(wire.usage) if wire.HasField("usage") else None,
    )


def completion_from(wire: pb.GenerateResponse) -> Completion:
    """Raises `ProtocolError` for an answer without samples."""
    if not wire.choices:
        raise ProtocolError("the server answered without a single sample")
    return Completion(
        request_id=wire.request_id,
        model=wire.model,
        choices=tuple(_choice(choice) for choice in wire.choices),
        prompt_logprobs=_prompt_logprobs(wire.prompt_logprobs),
        usage=_usage(wire.usage),
    )


def model_from(wire: pb.ModelCard) -> Model:
    return Model(
        name=wire.name,
        max_model_len=wire.max_model_len,
        vocab_size=wire.vocab_size,
        has_chat_template=wire.has_chat_template,
        prefill_workers=wire.prefill_workers,
        decode_workers=wire.decode_workers,
        ready=wire.ready,
        aliases=tuple(wire.aliases),
        sla_classes=tuple(wire.sla_classes),
    )


def _choice(wire: pb.Choice) -> Choice:
    return Choice(
        index=wire.index,
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        logprobs=_logprobs(wire.logprobs),
        finish_reason=_REASONS.get(wire.finish_reason, FinishReason.ABORT),
        matched_stop=wire.matched_stop if wire.HasField("matched_stop") else None,
        timings=_timings(wire.timings),
    )


def _position(wire: pb.PositionLogprobs) -> TokenLogprobs:
    return TokenLogprobs(wire.token_id, wire.logprob, tuple((top.token_id, top.logprob) for top in wire.top))


def _logprobs(wire: Iterable[pb.PositionLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(map(_position, wire))


def _prompt_logprobs(wire: pb.PromptLogprobs) -> tuple[TokenLogprobs | None, ...]:
    if not wire.positions:
        return ()
    return (None, *map(_position, wire.positions[1:]))


def _timings(wire: pb.Timings) -> Timings:
    return Timings(
        queue_s=wire.queue_s,
        prefill_s=wire.prefill_s,
        transfer_exposed_s=wire.transfer_exposed_s,
        ttft_s=wire.ttft_s,
        tpot_s=wire.tpot_s,
        e2e_s=wire.e2e_s,
        bytes_moved=wire.bytes_moved,
        transfer_path=wire.transfer_path,
        transfer_gb_per_s=wire.transfer_gb_per_s,
        prefill_worker=wire.prefill_worker,
        decode_worker=wire.decode_worker,
        attempts=wire.attempts,
        prefill_queue_s=wire.prefill_queue_s,
        preemptions=wire.preemptions,
        sla_class=wire.sla_class,
        ttft_target_s=wire.ttft_target_s if wire.HasField("ttft_target_s") else None,
        tpot_target_s=wire.tpot_target_s if wire.HasField("tpot_target_s") else None,
        ttft_late_s=wire.ttft_late_s if wire.HasField("ttft_late_s") else None,
        tpot_late_s=wire.tpot_late_s if wire.HasField("tpot_late_s") else None,
        ttft_missed_in=wire.ttft_missed_in,
        tpot_missed_in=wire.tpot_missed_in,
        ttft_predicted_s=wire.ttft_predicted_s if wire.HasField("ttft_predicted_s") else None,
        tpot_predicted_s=wire.tpot_predicted_s if wire.HasField("tpot_predicted_s") else None,
    )


def _usage(wire: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=wire.prompt_tokens,
        completion_tokens=wire.completion_tokens,
        cached_prompt_tokens=wire.cached_prompt_tokens,
    )
