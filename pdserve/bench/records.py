"""What happened to one request, and the figures of many."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.bench.slo import Latencies, Slo, missed
from pdserve.bench.statistics import percentiles
from pdserve.client import Timings


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRecord:
    """All times in seconds since the trial began; latencies count from `intended_s`."""

    system: str
    rate: float
    round: int
    session: int
    turn: int
    class_name: str
    slo: Slo
    warmup: bool
    intended_s: float
    """When the workload says it is sent, whatever the server or this client were doing then."""
    asked_output_tokens: int
    sent_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    """When each message with tokens arrived."""
    token_counts: list[int] = field(default_factory=list)
    done_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    """The kind of failure; "cut" for what was not answered when the trial ended."""
    error_text: str = ""
    timings: Timings | None = None
    """pdserve's own account."""

    @property
    def ok(self) -> bool:
        return self.error is None and self.done_s is not None

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.intended_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        return self.done_s - self.intended_s if self.ok and self.done_s is not None else None

    @property
    def tpot_s(self) -> float | None:
        if not self.ok or self.output_tokens < 2 or len(self.token_times_s) < 2:
            return None
        # What came with the first message had no gap of its own.
        return (self.token_times_s[-1] - self.token_times_s[0]) / max(
            1, self.output_tokens - self.token_counts[0]
        )

    @property
    def itl_s(self) -> list[float]:
        times = self.token_times_s
        return [after - before for before, after in itertools.pairwise(times)]

    def missed(self) -> list[str]:
        """Names of the targets it missed; "error" when there is no complete answer."""
        ttft_s, e2e_s = self.ttft_s, self.e2e_s
        if not self.ok or ttft_s is None or e2e_s is None:
            return ["error"]
        return missed(self.slo, Latencies(ttft_s, self.tpot_s, self.itl_s, e2e_s))

    @property
    def met(self) -> bool:
        return not self.missed()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One system at one rate, once."""

    system: str
    rate: float
    round: int
    records: list[RequestRecord]
    wall_s: float
    """From the first counted arrival to the last answer."""
    num_clipped: int
    started_s: float
    """Since the run began: to see which trials were neighbours."""

    @property
    def counted(self) -> list[RequestRecord]:
        """Without warm-up, in order of intended time."""
        return sorted((r for r in self.records if not r.warmup), key=lambda r: r.intended_s)

    @property
    def met(self) -> list[bool]:
        return [record.met for record in self.counted]

    @property
    def attainment(self) -> float:
        met = self.met
        return sum(met) / len(met) if met else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of some requests; latencies in seconds by mean, p50 ... max."""

    num_requests: int
    num_ok: int
    num_met: int
    errors: dict[str, int]
    misses: dict[str, int]
    """By target; one request may miss several."""
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    itl_s: dict[str, float]
    e2e_s: dict[str, float]
    send_lag_s: dict[str, float]
    """How late this client was: large values mean that the client, not the server, was the limit."""
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    wall_s: float

    @property
    def attainment(self) -> float:
        return self.num_met / self.num_requests if self.num_requests else 0.0

    @property
    def goodput(self) -> float:
        """Requests per second that met their targets."""
        return self.num_met / self.wall_s if self.wall_s else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s if self.wall_s else 0.0


def summarise(records: Sequence[RequestRecord], wall_s: float) -> Summary:
    ok = [record for record in records if record.ok]
    return Summary(
        num_requests=len(records),
        num_ok=len(ok),
        num_met=sum(record.met for record in records),
        errors=dict(Counter(record.error for record in records if record.error)),
        misses=dict(Counter(name for record in records for name in record.missed())),
        ttft_s=percentiles([value for r in records if (value := r.ttft_s) is not None]),
        tpot_s=percentiles([value for r in ok if (value := r.tpot_s) is not None]),
        itl_s=percentiles([gap for r in ok for gap in r.itl_s]),
        e2e_s=percentiles([value for r in ok if (value := r.e2e_s) is not None]),
        send_lag_s=percentiles([r.sent_s - r.intended_s for r in records if r.sent_s]),
        output_tokens=sum(record.output_tokens for record in records),
        prompt_tokens=sum(record.prompt_tokens for record in records),
        cached_tokens=sum(record.cached_tokens for record in records),
        wall_s=wall_s,
    )
