"""Who goes first."""

from __future__ import annotations

import math
from typing import NamedTuple

from pdserve.core.messages import RequestSpec


class Urgency(NamedTuple):
    """Smaller goes first: earliest TTFT deadline, then priority, then arrival; the last field breaks ties."""

    ttft_deadline: float
    priority: int
    arrival: float
    order: int


def prefill_urgency(spec: RequestSpec, order: int) -> Urgency:
    deadline = math.inf if spec.ttft_deadline is None else spec.ttft_deadline
    return Urgency(deadline, spec.priority, spec.arrival, order)


def decode_urgency(spec: RequestSpec, order: int) -> Urgency:
    """Once tokens stream, the deadline of the first is past caring: priority, then arrival."""
    return Urgency(0.0, spec.priority, spec.arrival, order)
