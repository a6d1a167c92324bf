"""Targets a request must meet, and the presets that go by a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import Field

from pdserve.bench.distributions import Frozen
from pdserve.core.errors import ConfigError


class Slo(Frozen):
    """A request meets it when every target that is given is met; one that failed never does."""

    ttft_ms: float | None = Field(default=None, gt=0)
    """From the intended send time to the first token."""
    tpot_ms: float | None = Field(default=None, gt=0)
    """Mean time per token after the first."""
    itl_p99_ms: float | None = Field(default=None, gt=0)
    """99th percentile of the gaps between the answer's messages."""
    e2e_ms: float | None = Field(default=None, gt=0)
    """From the intended send time to the last token."""

    def describe(self) -> str:
        names = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_p99_ms": "ITL p99", "e2e_ms": "e2e"}
        said = [f"{label} {value:g} ms" for key, label in names.items() if (value := getattr(self, key))]
        return ", ".join(said) or "every answer complete"


PRESETS: Final[dict[str, Slo]] = {
    "mlperf-llama2-70b": Slo(ttft_ms=2000, tpot_ms=200),
    "mlperf-llama2-70b-interactive": Slo(ttft_ms=450, tpot_ms=40),
    "mlperf-llama3.1-8b-interactive": Slo(ttft_ms=500, tpot_ms=30),
    "mlperf-llama3.1-405b": Slo(ttft_ms=6000, tpot_ms=175),
}
"""MLPerf Inference's limits for its server and interactive scenarios; there 99% of queries must meet each."""


def preset(name: str) -> Slo:
    """Raises `ConfigError` for a name that is not in `PRESETS`."""
    if name not in PRESETS:
        raise ConfigError(f"slo preset {name!r} is not known; one of {', '.join(PRESETS)} is")
    return PRESETS[name]


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one complete answer, in seconds."""

    ttft_s: float
    tpot_s: float | None
    """None for an answer of one token."""
    itl_s: Sequence[float]
    e2e_s: float


def missed(slo: Slo, latencies: Latencies) -> list[str]:
    """The names of the targets that were missed."""
    itl_p99_s = float(np.percentile(latencies.itl_s, 99)) if latencies.itl_s else None
    measured = {
        "ttft": (latencies.ttft_s, slo.ttft_ms),
        "tpot": (latencies.tpot_s, slo.tpot_ms),
        "itl_p99": (itl_p99_s, slo.itl_p99_ms),
        "e2e": (latencies.e2e_s, slo.e2e_ms),
    }
    return [
        name
        for name, (value_s, limit_ms) in measured.items()
        if limit_ms is not None and value_s is not None and value_s * 1e3 > limit_ms
    ]
