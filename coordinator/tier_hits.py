"""What a beginning of a prompt is worth that lies in a worker's tiers, not in its pool. Pure."""

from __future__ import annotations

from typing import Final

from coordinator.fleet import WorkerState

KNOWN: Final = 5
"""Prompts that a worker must have read before its speed is known."""
MOST: Final = 0.9
"""However soon it is back: who has it in the pool need not wait for anything."""


def tier_worth(worker: WorkerState, start: int, end: int) -> int:
    """As how many cached tokens tokens [start, end) count, that the worker has in its tiers.

    They are read back, which takes bytes over the rate that it measured, instead of computed, at the speed
    that was learned: of the computing, the share that is saved. None where it would rather compute them.
    Where its speed is not known it is taken to be slow, as the worker does.
    """
    rate = 0.0 if worker.heartbeat is None else worker.heartbeat.tiers.load_bytes_per_s
    if rate <= 0 or end <= start:
        return 0
    load_s = (end - start) * worker.kv_token_bytes / rate
    fit, share = worker.latency.prefill, MOST
    if fit.count >= KNOWN:
        compute_s = fit.predict((0, end - start, (end * end - start * start) / 2))
        share = min(1 - load_s / compute_s, MOST) if compute_s > load_s else 0.0
    return int(share * (end - start))
