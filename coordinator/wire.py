"""From our values to the public protocol's: log-probabilities, timings, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc

from coordinator.report import Report
from pdserve.core.errors import (
    ErrorCode,
    InvalidRequest,
    ModelNotFound,
    NoWorkers,
    Overloaded,
    PdServeError,
    WorkerLost,
)
from pdserve.core.messages import FinishReason
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import TokenLogprobs

FINISH_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
DEFAULT_RETRY_S: Final = 1.0
_MAX_METADATA_CHARS: Final = 256

Metadata = tuple[tuple[str, str], ...]


def position_logprobs(entry: TokenLogprobs) -> pb.PositionLogprobs:
    return pb.PositionLogprobs(
        token_id=entry.token,
        logprob=entry.logprob,
        top=[pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )


def prompt_logprobs(tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> pb.PromptLogprobs:
    """One position per prompt token; the one that nothing precedes has the token alone."""
    positions = [
        pb.PositionLogprobs(token_id=token) if entry is None else position_logprobs(entry)
        for token, entry in zip(tokens, entries, strict=False)
    ]
    return pb.PromptLogprobs(positions=positions)


def timings(report: Report) -> pb.Timings:
    return pb.Timings(
        queue_s=report.queue_s,
        prefill_s=report.prefill_s or 0.0,
        transfer_exposed_s=report.transfer_exposed_s or 0.0,
        ttft_s=report.ttft_s or 0.0,
        tpot_s=report.tpot_s or 0.0,
        e2e_s=report.e2e_s,
        bytes_moved=report.bytes_moved,
        transfer_path=report.transfer_path,
        transfer_gb_per_s=report.transfer_gb_per_s,
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        attempts=report.attempts,
        sla_class=report.sla_class,
        ttft_target_s=report.ttft_target_s,
        tpot_target_s=report.tpot_target_s,
        ttft_late_s=report.ttft_late_s,
        tpot_late_s=report.tpot_late_s,
        ttft_missed_in=report.ttft_missed_in,
        tpot_missed_in=report.tpot_missed_in,
        ttft_predicted_s=report.predicted_ttft_s,
        tpot_predicted_s=report.predicted_tpot_s,
        preemptions=report.preemptions,
        prefill_queue_s=report.prefill_queue_s,
    )


def status_of(error: PdServeError) -> tuple[grpc.StatusCode, str, Metadata]:
    """Status, message and trailing metadata (named in generation.proto) of an error."""
    metadata = [("pdserve-error", type(error).__name__)]
    if isinstance(error, InvalidRequest):
        metadata += [
            ("pdserve-error-field", _printable(error.field)),
            ("pdserve-error-value", _printable(repr(error.value))),
            ("pdserve-error-limit", _printable(error.limit)),
        ]
    elif isinstance(error, ModelNotFound):
        metadata.append(("pdserve-error-model", _printable(error.model)))
    elif isinstance(error, WorkerLost):
        metadata.append(("pdserve-error-worker", _printable(error.worker)))
    retry_s = _retry_after_s(error)
    if retry_s is not None:
        metadata.append(("retry-after-ms", str(max(1, round(retry_s * 1e3)))))
    return grpc.StatusCode[ErrorCode(error.code).name], str(error), tuple(metadata)


def _retry_after_s(error: PdServeError) -> float | None:
    if isinstance(error, Overloaded):
        return error.retry_after_s or DEFAULT_RETRY_S
    return DEFAULT_RETRY_S if isinstance(error, NoWorkers | WorkerLost) else None


def _printable(text: str) -> str:
    """gRPC metadata is printable ASCII."""
    plain = text.encode("ascii", "backslashreplace").decode()
    shown = "".join(c if c.isprintable() else " " for c in plain)
    return shown if len(shown) <= _MAX_METADATA_CHARS else shown[: _MAX_METADATA_CHARS - 3] + "..."
