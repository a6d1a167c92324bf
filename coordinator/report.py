"""What is known about a sample when it ends: for the last delta, the metrics and the log line."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.account import Leg
from coordinator.decisions import Placement
from pdserve.core.ids import RequestId
from pdserve.core.lifecycle import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Times in seconds. None: it did not come to that."""

    id: RequestId
    model: str
    tenant: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    attempts: int
    e2e_s: float
    queue_s: float
    """Waiting at the coordinator, and at the prefill worker in the last attempt."""
    prefill_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    """Mean over the tokens after the first; None for fewer than two."""
    transfer_exposed_s: float | None = None
    transfer_busy_s: float | None = None
    bytes_moved: int = 0
    transfer_path: str = ""
    cached_tokens: int = 0
    prefill_worker: str = ""
    """Empty when the decode worker read the prompt itself."""
    decode_worker: str = ""
    migrations: int = 0
    """Moves to another decode worker, with its KV."""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None
    """As predicted when it was placed first."""
    sla_class: str = ""
    preemptions: int = 0
    """How often it was interrupted by more urgent requests."""
    prefill_queue_s: float = 0.0
    """Waiting at the prefill worker, last attempt; a part of `queue_s`."""
    ttft_missed_in: str = ""
    tpot_missed_in: str = ""
    """What took longest of the time that a missed target is about (see `breakdown`)."""
    placed: Placement | None = None
    """Why these workers: candidates and scores of the last placement."""
    phase: Phase = Phase.FINISHED
    """How it ended."""
    created: float = 0.0
    submitted: float = 0.0
    """Validated and tokenised."""
    ended: float = 0.0
    first_token_at: float | None = None
    """These on the registry's clock."""
    legs: tuple[Leg, ...] = ()
    """Its attempts, each to its end."""
    traceparent: str = ""
    """W3C trace context that the client sent."""

    @property
    def transfer_gb_per_s(self) -> float:
        """Decimal gigabytes per second while at least one push was under way; 0 when nothing was moved."""
        return self.bytes_moved / self.transfer_busy_s / 1e9 if self.transfer_busy_s else 0.0

    @property
    def ttft_met(self) -> bool | None:
        """None without a target. A request that never gave a token has missed it."""
        return _met(self.ttft_s, self.ttft_target_s, missing=False)

    @property
    def tpot_met(self) -> bool | None:
        """None without a target. Fewer than two tokens cannot miss it."""
        return _met(self.tpot_s, self.tpot_target_s, missing=True)

    @property
    def ttft_late_s(self) -> float | None:
        """By how much its target was missed; below zero: how much was left. None without both."""
        return _late(self.ttft_s, self.ttft_target_s)

    @property
    def tpot_late_s(self) -> float | None:
        return _late(self.tpot_s, self.tpot_target_s)


def exceeds(value: float | None, target: float | None) -> bool:
    """Both are known, and the target is missed."""
    return value is not None and target is not None and value > target


def _late(value: float | None, target: float | None) -> float | None:
    return None if value is None or target is None else value - target


def _met(value: float | None, target: float | None, *, missing: bool) -> bool | None:
    if target is None:
        return None
    return missing if value is None else value <= target
