"""One line of JSON per ended sample, on the logger `pdserve.request`."""

from __future__ import annotations

import json
import logging

from coordinator.cost import Bill
from coordinator.report import Report
from pdserve.core.errors import PdServeError, RequestCancelled
from pdserve.core.messages import FinishReason

log = logging.getLogger("pdserve.request")


def log_end(report: Report, outcome: FinishReason | PdServeError, charged: Bill) -> None:
    """Ends asked for by a client are info, failures are warnings. Fields that do not apply are left out."""
    failed = isinstance(outcome, PdServeError) and not isinstance(outcome, RequestCancelled)
    level = logging.WARNING if failed else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s", json.dumps(as_fields(report, outcome, charged), separators=(",", ":")))


def as_fields(report: Report, outcome: FinishReason | PdServeError, charged: Bill) -> dict[str, object]:
    """The line's fields; times in milliseconds."""
    error = outcome if isinstance(outcome, PdServeError) else None
    fields: dict[str, object | None] = {
        "event": "request",
        "id": report.id,
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
        "cost": charged.money or None,
        "placement": report.placement or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
