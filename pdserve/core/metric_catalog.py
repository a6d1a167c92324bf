"""Every metric there is: name, kind, unit, labels, buckets and meaning. Nothing else names one.

`docs/metrics.md` is made from this, the instruments of coordinator and workers are, and a test compares
dashboards and alerting rules with it. Plain data: importing it needs no metrics library.

Names follow Prometheus: base units (seconds, bytes, tokens), `_total` on counters, which is left out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PREFIX: Final = "pdserve_"
RAY_PREFIX: Final = "ray_"
"""What Ray puts before the names that a worker gives it."""
MAX_TENANTS: Final = 64
MAX_PRIORITIES: Final = 8
MAX_CLASSES: Final = 16
"""Distinct values of a label before the next is counted as `other`: clients choose them."""

_FAST: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0, 5.0)
_SLOW: Final = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.75, 1.0, 1.5),
    *(2.0, 3.0, 6.0, 10.0, 20.0, 60.0, 120.0, 300.0),
)
_RATIOS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
_TOKENS: Final = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Who exposes it."""

    REQUESTS = "Requests"
    COST = "Cost"
    WORKERS = "Workers, as the coordinator hears of them"
    RAY = "Workers, through Ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    """Without `pdserve_`, and without `_total`."""
    kind: Kind
    source: Source
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """As a metrics library is told it."""
        return PREFIX + self.name

    @property
    def exposed(self) -> str:
        """As Prometheus stores it, the suffixes of a histogram apart."""
        prefix = RAY_PREFIX if self.source is Source.RAY else ""
        return prefix + self.full_name + ("_total" if self.kind is Kind.COUNTER else "")


CATALOG: list[Metric] = []
"""In the order of the documentation."""


def _metric(
    kind: Kind,
    source: Source,
    name: str,
    unit: str,
    help: str,
    labels: tuple[str, ...] = (),
    buckets: tuple[float, ...] = (),
) -> Metric:
    metric = Metric(name=name, kind=kind, source=source, unit=unit, help=help, labels=labels, buckets=buckets)
    CATALOG.append(metric)
    return metric


def _seconds(
    name: str, help: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ("model",)
) -> Metric:
    return _metric(Kind.HISTOGRAM, Source.REQUESTS, f"{name}_seconds", "seconds", help, labels, buckets)


def _counter(name: str, unit: str, help: str, *labels: str, source: Source = Source.REQUESTS) -> Metric:
    return _metric(Kind.COUNTER, source, name, unit, help, labels)


def _gauge(name: str, unit: str, help: str, *labels: str, source: Source = Source.REQUESTS) -> Metric:
    return _metric(Kind.GAUGE, source, name, unit, help, labels)


# --- requests ---------------------------------------------------------------------------------------

TTFT: Final = _seconds("ttft", "From arrival to the first token", _SLOW)
TPOT: Final = _seconds("tpot", "Mean time per token after the first, per sample", _FAST)
ITL: Final = _seconds("itl", "Between two outputs of a sample, per token", _FAST)
E2E: Final = _seconds("e2e", "From arrival to the end", _SLOW)
TOKENISE: Final = _seconds("tokenise", "Validating and tokenising a request", _FAST)
QUEUE: Final = _seconds("queue", "Waiting for workers: at the coordinator and at the prefill worker", _SLOW)
PREFILL: Final = _seconds("prefill", "Computing the prompt", _SLOW)
TRANSFER_EXPOSED: Final = _seconds(
    "transfer_exposed",
    "From the end of prefill to the last block's arrival: what computing does not hide of a transfer",
    _FAST,
    ("model", "path"),
)
REQUESTS: Final = _counter(
    "requests",
    "samples",
    "Samples that ended, by how: stop, length, or the error's name",
    "model",
    "outcome",
    "tenant",
    "priority",
)
ERRORS: Final = _counter(
    "errors", "requests", "Requests that ended with an error, at whatever point", "error"
)
TARGETS: Final = _counter(
    "targets",
    "targets",
    "Targets of ended samples; target: ttft or tpot, result: met or missed. Over this, the share met is the "
    "attainment of a service level",
    "model",
    "tenant",
    "sla_class",
    "target",
    "result",
)
ADMISSION_REFUSALS: Final = _counter(
    "admission_refusals",
    "samples",
    "Samples refused before any work, by reason: queue_full, queue_ttl, tenant_limit, deadline, ttft_target, "
    "tpot_target (these cannot be met), no_blocks, no_room, or an error's name",
    "model",
    "tenant",
    "reason",
)
ATTEMPTS: Final = _counter("attempts", "attempts", "Attempts of ended samples", "model")
ATTEMPT_FAILURES: Final = _counter(
    "attempt_failures",
    "attempts",
    "Attempts that failed, by reason: lease_expired (KV came too late), transfer (the transport failed), "
    "corrupt (counts or digest differed), worker_lost, no_room, other",
    "model",
    "reason",
)
RETRIES: Final = _counter("retries", "attempts", "New attempts after a failed one", "model")
MIGRATIONS: Final = _counter(
    "migrations", "moves", "Running requests moved to another decode worker", "model"
)
PREEMPTIONS: Final = _counter(
    "preemptions", "samples", "Interruptions of samples by more urgent ones, to go on later", "model"
)
PROMPT_TOKENS: Final = _counter(
    "prompt_tokens", "tokens", "Prompt tokens of ended samples", "model", "tenant"
)
CACHED_TOKENS: Final = _counter(
    "cached_prompt_tokens", "tokens", "Of these, found cached at decode", "model", "tenant"
)
OUTPUT_TOKENS: Final = _counter(
    "output_tokens", "tokens", "Tokens written by ended samples", "model", "tenant"
)
PROMPT_LENGTH: Final = _metric(
    Kind.HISTOGRAM, Source.REQUESTS, "prompt_length_tokens", "tokens", "Prompt length", ("model",), _TOKENS
)
OUTPUT_LENGTH: Final = _metric(
    Kind.HISTOGRAM, Source.REQUESTS, "output_length_tokens", "tokens", "Answer length", ("model",), _TOKENS
)
TRANSFER_BYTES: Final = _counter("transfer_bytes", "bytes", "KV bytes moved", "model", "path")
TRANSFER_BUSY: Final = _counter(
    "transfer_busy_seconds",
    "seconds",
    "Time that moving them took: transfer_bytes over this is the bandwidth",
    "model",
    "path",
)
PREFIX_FETCHES: Final = _counter(
    "prefix_fetches",
    "prefixes",
    "Beginnings of prompts that were asked of another worker before a prompt was read, by how that ended: "
    "arrived, there (nothing had to move), refused, failed, lost (a worker died), late",
    "model",
    "outcome",
)
PREFIX_FETCHED_BYTES: Final = _counter("prefix_fetched_bytes", "bytes", "KV bytes moved so", "model", "path")
PREFIX_FETCH_BUSY: Final = _counter(
    "prefix_fetch_busy_seconds", "seconds", "Time that moving them took", "model", "path"
)
PREDICTION_ERROR: Final = _metric(
    Kind.HISTOGRAM,
    Source.REQUESTS,
    "prediction_error_ratio",
    "ratio",
    "|predicted - measured| / measured, as predicted when a sample was placed",
    ("model", "what"),
    _RATIOS,
)
ACTIVE: Final = _gauge("active_requests", "samples", "Samples by phase", "phase")
WAITING: Final = _gauge("waiting_requests", "samples", "Samples that wait for a decode worker")
QUEUE_LIMIT: Final = _gauge("queue_limit", "samples", "How many may wait before more are refused")
PLANNER_PLANS: Final = _counter("planner_plans", "plans", "Plans by what became of them", "model", "standing")
PLANNER_RATE: Final = _gauge("planner_rate", "requests/s", "Arrivals that the planner predicts", "model")
PLANNER_CAPACITY: Final = _gauge(
    "planner_capacity",
    "requests/s",
    "What the fleet serves in time, as it is and as it is wanted",
    "model",
    "fleet",
)
PLANNER_WANTED: Final = _gauge(
    "planner_wanted_workers", "workers", "Of the split that is wanted", "model", "role"
)
LOOP_LAG: Final = _gauge(
    "loop_lag_seconds", "seconds", "How late the coordinator's event loop was at its latest tick"
)

# --- cost -------------------------------------------------------------------------------------------

DEVICE_SECONDS: Final = _counter(
    "device_seconds",
    "device-seconds",
    "Time of GPUs (of cores on a CPU) that samples took: their share of the steps they were in. activity: "
    "prefill or decode; use: answer, or wasted (of samples that failed or were cancelled, and prompts read "
    "again)",
    "model",
    "tenant",
    "activity",
    "use",
    source=Source.COST,
)
KV_BYTE_SECONDS: Final = _counter(
    "kv_byte_seconds",
    "byte-seconds",
    "KV held on decode workers, by size and time",
    "model",
    "tenant",
    source=Source.COST,
)
COST: Final = _counter(
    "cost",
    "money",
    "Device time and KV held, at the prices of the configuration; activity: prefill, decode or kv",
    "model",
    "tenant",
    "activity",
    "use",
    source=Source.COST,
)
DEVICE_PRICE: Final = _gauge(
    "device_price_per_hour",
    "money",
    "Price of one device for an hour, as configured",
    "role",
    "currency",
    source=Source.COST,
)

# --- workers, from their heartbeats -----------------------------------------------------------------

_W: Final = Source.WORKERS
WORKER_UP: Final = _gauge(
    "worker_up", "bool", "1 while a worker can be talked to", "worker", "role", "model", source=_W
)
WORKER_DRAINING: Final = _gauge(
    "worker_draining", "bool", "1 while it takes no new requests", "worker", source=_W
)
WORKER_START: Final = _gauge(
    "worker_start_seconds",
    "seconds",
    "Its latest start by phase: process, ranks, copy, kernels, weights, matrices, kv_cache, graphs, transfer",
    "worker",
    "phase",
    source=_W,
)
WORKER_DEVICES: Final = _gauge(
    "worker_devices", "devices", "GPUs, or cores, it computes on", "worker", "role", "device", source=_W
)
WORKER_BLOCKS: Final = _gauge(
    "blocks", "blocks", "KV blocks by state: free, held, cached, quarantined", "worker", "state", source=_W
)
WORKER_RUNNING: Final = _gauge(
    "worker_running", "requests", "Requests that compute: the decode batch", "worker", "role", source=_W
)
WORKER_WAITING: Final = _gauge(
    "worker_waiting", "requests", "Requests that wait on a worker", "worker", "role", source=_W
)
WORKER_CONTEXT: Final = _gauge(
    "worker_pending_tokens",
    "tokens",
    "Prompt tokens not yet computed (prefill), or context tokens in the batch (decode)",
    "worker",
    "role",
    source=_W,
)
WORKER_STEP: Final = _gauge(
    "worker_step_seconds", "seconds", "Moving average of a step", "worker", "role", source=_W
)
WORKER_STEP_AGE: Final = _gauge(
    "worker_step_age_seconds", "seconds", "How long the step under way has lasted", "worker", source=_W
)
WORKER_SPEED: Final = _gauge(
    "worker_tokens_per_second", "tokens/s", "As the worker measures it, in steps", "worker", "role", source=_W
)
WORKER_STEPS: Final = _counter("worker_steps", "steps", "Steps", "worker", "role", source=_W)
WORKER_TOKENS: Final = _counter(
    "worker_tokens", "tokens", "Tokens computed, prompt and answer", "worker", "role", source=_W
)
WORKER_BUSY: Final = _counter(
    "worker_busy_seconds",
    "seconds",
    "Time spent in steps: its rate is the share in use",
    "worker",
    "role",
    source=_W,
)
WORKER_PREEMPTIONS: Final = _counter(
    "worker_preemptions",
    "requests",
    "Requests that lost their blocks to another, for want of room or to a more urgent one",
    "worker",
    source=_W,
)
PREFIX_QUERIES: Final = _counter(
    "prefix_query_tokens",
    "tokens",
    "Prompt tokens looked for in the prefix cache",
    "worker",
    "role",
    source=_W,
)
PREFIX_HITS: Final = _counter(
    "prefix_hit_tokens", "tokens", "Of these, found in the pool", "worker", "role", source=_W
)
TIER_HITS: Final = _counter(
    "tier_hit_tokens", "tokens", "Prompt tokens brought back from a lower tier", "worker", "tier", source=_W
)
TIER_BYTES: Final = _gauge(
    "tier_bytes", "bytes", "Occupied in a tier below the pool", "worker", "tier", source=_W
)
TIER_MOVED: Final = _counter(
    "tier_moved_bytes",
    "bytes",
    "Between pool and lower tiers; direction: stored or loaded",
    "worker",
    "direction",
    source=_W,
)
TIER_LOST: Final = _counter(
    "tier_lost_blocks",
    "blocks",
    "Blocks that no tier kept; why: dropped, missed, corrupt or io_error",
    "worker",
    "why",
    source=_W,
)
PAIR_BANDWIDTH: Final = _gauge(
    "pair_bytes_per_second",
    "bytes",
    "What a large write to a transfer peer reached when they met",
    "worker",
    "peer",
    "path",
    source=_W,
)
PAIR_LATENCY: Final = _gauge(
    "pair_latency_seconds",
    "seconds",
    "What a small write to a transfer peer took when they met",
    "worker",
    "peer",
    "path",
    source=_W,
)
PAIR_UP: Final = _gauge(
    "pair_up", "bool", "1 while KV can be moved from the worker to the peer", "worker", "peer", source=_W
)
DRAFTED: Final = _counter(
    "draft_tokens",
    "tokens",
    "Tokens proposed by speculative decoding; position: in the proposal, from 0",
    "worker",
    "position",
    source=_W,
)
ACCEPTED: Final = _counter(
    "draft_accepted_tokens", "tokens", "Of these, accepted", "worker", "position", source=_W
)
DEVICE_UTILISATION: Final = _gauge(
    "device_utilisation_ratio",
    "ratio",
    "Share of the time the GPU computed; on a CPU, of the worker's cores",
    "worker",
    "role",
    source=_W,
)
DEVICE_MEMORY: Final = _gauge(
    "device_memory_bytes",
    "bytes",
    "Memory of the GPU; on a CPU, of the worker's process and of the machine. what: used or total",
    "worker",
    "what",
    source=_W,
)
DEVICE_POWER: Final = _gauge("device_power_watts", "watts", "What the GPU draws", "worker", source=_W)
REFUSALS: Final = _counter(
    "refusals", "offers", "Offers that decode workers refused, by reason", "worker", "reason", source=_W
)
LATENCY_ERROR: Final = _gauge(
    "latency_model_error_ratio",
    "ratio",
    "Mean relative error of the latency model",
    "worker",
    "what",
    source=_W,
)

# --- workers, through Ray ---------------------------------------------------------------------------

_R: Final = Source.RAY
_OWN: Final = ("worker", "role", "model")
RAY_RUNNING: Final = _gauge("actor_running", "requests", "Requests that compute", *_OWN, source=_R)
RAY_WAITING: Final = _gauge("actor_waiting", "requests", "Requests that wait", *_OWN, source=_R)
RAY_BLOCKS: Final = _gauge("actor_blocks", "blocks", "KV blocks by state", *_OWN, "state", source=_R)
RAY_STEP: Final = _gauge("actor_step_seconds", "seconds", "Moving average of a step", *_OWN, source=_R)
RAY_BUSY: Final = _counter("actor_busy_seconds", "seconds", "Time spent in steps", *_OWN, source=_R)
RAY_TOKENS: Final = _counter("actor_tokens", "tokens", "Tokens computed", *_OWN, source=_R)
RAY_UTILISATION: Final = _gauge(
    "actor_device_utilisation_ratio", "ratio", "As device_utilisation_ratio", *_OWN, source=_R
)
RAY_MEMORY: Final = _gauge(
    "actor_device_memory_bytes", "bytes", "Used; as device_memory_bytes", *_OWN, source=_R
)


def of(*sources: Source) -> list[Metric]:
    """The metrics of these sources."""
    return [metric for metric in CATALOG if metric.source in sources]


def series_names() -> dict[str, Metric]:
    """Every name a query can ask for."""
    names: dict[str, Metric] = {}
    for metric in CATALOG:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        names |= {metric.exposed + suffix: metric for suffix in suffixes}
    return names
