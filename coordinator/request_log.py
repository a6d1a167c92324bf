"""A request's lines on the coordinator: taken in, placed, ended. On the logger `pdserve.request`."""

from __future__ import annotations

import logging

from coordinator.cost import Bill
from coordinator.events import NewRequest
from coordinator.report import Report
from pdserve.core.errors import PdServeError, RequestCancelled
from pdserve.core.ids import WorkerId
from pdserve.core.logs import REQUESTS, about
from pdserve.core.messages import FinishReason, StartDecode

log = logging.getLogger(REQUESTS)


def log_end(report: Report, outcome: FinishReason | PdServeError, charged: Bill) -> None:
    """Ends asked for by a client are info, failures are warnings. Fields that do not apply are left out."""
    failed = isinstance(outcome, PdServeError) and not isinstance(outcome, RequestCancelled)
    level = logging.WARNING if failed else logging.INFO
    if log.isEnabledFor(level):
        attempt = report.legs[-1].attempt if report.legs else None
        fields = as_fields(report, outcome, charged)
        log.log(level, "ended", extra=about(report.id, attempt, **fields))


def log_accepted(sample: NewRequest) -> None:
    if log.isEnabledFor(logging.INFO):
        fields = {
            "model": sample.model,
            "tenant": sample.tenant or None,
            "sla_class": sample.sla_class or None,
            "prompt_tokens": len(sample.tokens),
            "max_tokens": sample.sampling.max_tokens,
            "trace_id": sample.traceparent.split("-")[1] if sample.traceparent.count("-") == 3 else None,
        }
        log.info("accepted", extra=about(sample.id, None, **fields))


def log_placed(message: StartDecode, worker: WorkerId) -> None:
    if log.isEnabledFor(logging.INFO):
        reader = message.prefill_worker or worker
        extra = about(attempt=message.spec.attempt, decode_worker=worker, prefill_worker=reader)
        log.info("placed", extra=extra)


def as_fields(report: Report, outcome: FinishReason | PdServeError, charged: Bill) -> dict[str, object]:
    """The last line's fields; times in milliseconds."""
    error = outcome if isinstance(outcome, PdServeError) else None
    fields: dict[str, object | None] = {
        "model": report.model,
        "tenant": report.tenant or None,
        "priority": report.priority,
        "outcome": type(outcome).__name__ if error is not None else str(outcome),
        "error": None if error is None else str(error),
        "prompt_tokens": report.prompt_tokens,
        "cached_tokens": report.cached_tokens,
        "output_tokens": report.output_tokens,
        "attempts": report.attempts,
        "preemptions": report.preemptions or None,
        "sla_class": report.sla_class or None,
        "prefill_worker": report.prefill_worker or None,
        "decode_worker": report.decode_worker or None,
        "queue_ms": _ms(report.queue_s),
        "prefill_ms": _ms(report.prefill_s),
        "transfer_exposed_ms": _ms(report.transfer_exposed_s),
        "bytes_moved": report.bytes_moved or None,
        "transfer_path": report.transfer_path or None,
        "transfer_gb_per_s": round(report.transfer_gb_per_s, 3) or None,
        "ttft_ms": _ms(report.ttft_s),
        "ttft_target_ms": _ms(report.ttft_target_s),
        "ttft_met": report.ttft_met,
        "ttft_late_ms": _ms(report.ttft_late_s),
        "ttft_missed_in": report.ttft_missed_in or None,
        "ttft_predicted_ms": _ms(report.predicted_ttft_s),
        "tpot_predicted_ms": _ms(report.predicted_tpot_s),
        "tpot_ms": _ms(report.tpot_s),
        "tpot_target_ms": _ms(report.tpot_target_s),
        "tpot_met": report.tpot_met,
        "tpot_late_ms": _ms(report.tpot_late_s),
        "tpot_missed_in": report.tpot_missed_in or None,
        "e2e_ms": _ms(report.e2e_s),
        "failures": [leg.failure for leg in report.legs if leg.failure] or None,
        "device_ms": _ms(charged.device_s),
        "wasted_device_ms": _ms(charged.wasted_device_s) or None,
        "kv_gib_s": round(charged.kv_byte_s / 2**30, 6),
        "cost": round(charged.money, 9) or None,
        "placement": None if report.placed is None else str(report.placed),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
