"""What the page shows, as plain data for JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.console.watch import WINDOW_S, ConsoleWatch, Ended, Lost
from coordinator.fleet import WorkerState
from coordinator.planner.proposal import Proposal
from coordinator.registry import Registry
from pdserve.core.ids import WorkerId

RECENT: Final = 50

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, slots=True)
class Rights:
    """What the page may do for whoever looks at it."""

    keys: bool
    """The service asks for keys; without, nothing can be changed from the page."""


def state(
    registry: Registry,
    watch: ConsoleWatch,
    proposals: Sequence[Proposal],
    rights: Rights,
    now: float,
    *,
    stands_by: Callable[[WorkerId], bool],
) -> Json:
    """Everything but the story of a single request."""
    return {
        "rights": {"keys": rights.keys},
        "requests": {
            "active": registry.num_active,
            "waiting": registry.num_waiting,
            "phases": {phase.value: count for phase, count in registry.phases().items()},
        },
        "workers": [
            _worker(worker, stands_by=stands_by(worker.id))
            for worker in sorted(registry.fleet, key=lambda w: (w.model, w.id))
        ]
        + [_lost(lost) for lost in watch.lost()],
        "flows": [
            {"from": source, "to": target, "bytes_per_s": rate}
            for (source, target), rate in sorted(watch.flows(now).items())
        ],
        "window_s": WINDOW_S,
        "classes": [
            {
                "model": model,
                "class": sla_class,
                "requests": tally.requests,
                "failed": tally.failed,
                "ttft": [tally.ttft_met, tally.ttft_missed],
                "tpot": [tally.tpot_met, tally.tpot_missed],
            }
            for (model, sla_class), tally in sorted(watch.tallies().items())
        ],
        "recent": [_ended(ended, now) for ended in watch.last(RECENT)],
        "plans": [
            {"model": plan.model, "standing": plan.standing.value, "reason": plan.reason}
            for plan in proposals
        ],
    }


def _worker(worker: WorkerState, *, stands_by: bool) -> Json:
    beat = worker.heartbeat
    shown: dict[str, Json] = {
        "id": worker.id,
        "role": worker.info.role.value,
        "model": worker.model,
        "epoch": worker.info.epoch,
        "up": worker.up,
        "standing": "standing by" if stands_by and worker.up else _standing(worker),
        "placed": worker.num_placed,
    }
    if beat is None:
        return shown
    blocks = beat.blocks
    return shown | {
        "running": beat.running,
        "waiting": beat.waiting,
        "waiting_tokens": beat.waiting_tokens,
        "step_ms": beat.step_s * 1e3,
        "tokens_per_s": beat.tokens_per_s,
        "busy": None if beat.device is None else beat.device.utilisation,
        "prefix_hits": beat.prefix_hit_tokens / beat.prefix_query_tokens
        if beat.prefix_query_tokens
        else None,
        "blocks": {
            "total": blocks.total,
            "held": blocks.held,
            "cached": blocks.cached,
            "quarantined": blocks.quarantined,
            "free": blocks.free,
        },
        "pairs": [
            {
                "peer": pair.peer,
                "path": pair.path,
                "bytes_per_s": pair.bytes_per_s,
                "latency_s": pair.latency_s,
                "error": pair.error,
            }
            for pair in beat.pairs
        ],
    }


def _lost(lost: Lost) -> Json:
    return {
        "id": lost.id,
        "role": lost.role.value,
        "model": lost.model,
        "up": False,
        "standing": "lost",
        "placed": 0,
    }


def _standing(worker: WorkerState) -> str:
    if not worker.up:
        return "reconnecting" if worker.redialling else "down"
    if worker.role_asked is not None:
        return f"becoming {worker.role_asked.value}"
    if worker.draining:
        return "draining"
    return "up"


def _ended(ended: Ended, now: float) -> Json:
    report = ended.report
    return {
        "id": report.id,
        "ago_s": now - ended.at,
        "model": report.model,
        "tenant": report.tenant,
        "class": report.sla_class,
        "outcome": ended.outcome,
        "prompt_tokens": report.prompt_tokens,
        "output_tokens": report.output_tokens,
        "ttft_s": report.ttft_s,
        "tpot_s": report.tpot_s,
        "e2e_s": report.e2e_s,
        "ttft_met": report.ttft_met,
        "tpot_met": report.tpot_met,
        "prefill_worker": report.prefill_worker,
        "decode_worker": report.decode_worker,
        "attempts": report.attempts,
    }
