"""Every metric of the coordinator, by name. Labels whose values clients choose are bounded."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from coordinator.fleet import Fleet
from coordinator.report import Report
from pdserve.core.errors import PdServeError
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import FinishReason

MAX_LABEL_VALUES: Final = 64
"""Distinct tenants, and distinct priorities, before the next is counted as `other`."""
_FAST: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_RATIOS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5)
_SLOW: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Bounded:
    """The first values seen keep their names."""

    def __init__(self, limit: int = MAX_LABEL_VALUES) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._limit:
                return "other"
            self._known.add(value)
        return value


class Metrics:
    """Observations of one coordinator, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tenant, self._priority = Bounded(), Bounded()
        self._itl_of: dict[str, Histogram] = {}
        by_model = ["model"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"pdserve_{name}_seconds", text, by_model, buckets=buckets, registry=self.registry
            )

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"pdserve_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(f"pdserve_{name}", text, labels, registry=self.registry)

        self.ttft = histogram("ttft", "From arrival to the first token", _SLOW)
        self.tpot = histogram("tpot", "Mean time per token after the first, per sample", _FAST)
        self.itl = histogram("itl", "Between two outputs of a sample, per token", _FAST)
        self.e2e = histogram("e2e", "From arrival to the end", _SLOW)
        self.queue = histogram("queue", "Waiting for workers", _SLOW)
        self.prefill = histogram("prefill", "Computing the prompt", _SLOW)
        self.transfer_exposed = histogram(
            "transfer_exposed", "From the end of prefill to the last block's arrival", _FAST
        )
        self.tokenise = histogram("tokenise", "Validating and tokenising a request", _FAST)
        self.transfer_bytes = counter("transfer_bytes", "KV bytes moved", ["model", "path"])
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of ended samples", by_model)
        self.cached_tokens = counter("cached_prompt_tokens", "Of these, found cached at decode", by_model)
        self.output_tokens = counter("output_tokens", "Tokens written by ended samples", by_model)
        self.attempts = counter("attempts", "Attempts of ended samples", by_model)
        self.requests = counter("requests", "Samples that ended", ["model", "outcome", "tenant", "priority"])
        self.prediction_error = Histogram(
            "pdserve_prediction_error_ratio",
            "|predicted - measured| / measured, as predicted when a sample was placed",
            ["model", "what"],
            buckets=_RATIOS,
            registry=self.registry,
        )
        self.targets = counter("targets", "Targets of ended samples", ["model", "target", "result"])
        self.errors = counter("errors", "Requests that ended with an error, at whatever point", ["error"])
        self.refusals = counter("refusals", "Refusals of decode workers", ["worker", "reason"])
        self.active = gauge("active_requests", "Samples by phase", ["phase"])
        self.waiting = gauge("waiting_requests", "Samples that wait for a decode worker", [])
        self.worker_up = gauge("worker_up", "1 while a worker can be talked to", ["worker", "role", "model"])
        self.blocks = gauge("blocks", "KV blocks by state", ["worker", "state"])
        self.worker_running = gauge("worker_running", "Requests that compute", ["worker"])
        self.worker_waiting = gauge("worker_waiting", "Requests that wait on a worker", ["worker"])
        self.worker_step = gauge("worker_step_seconds", "Moving average of a step", ["worker"])
        self.worker_speed = gauge("worker_tokens_per_second", "As the worker measures it", ["worker"])
        self.latency_error = gauge(
            "latency_model_error_ratio", "Mean relative error of the latency model", ["worker", "what"]
        )
        self.prefix_hits = gauge("worker_prefix_hit_tokens", "Since the worker's start", ["worker"])
        self.prefix_queries = gauge("worker_prefix_query_tokens", "Since the worker's start", ["worker"])

    def gap(self, model: str, gap_s: float, tokens: int) -> None:
        """`tokens` came together, `gap_s` after the output before them: each counts for its share."""
        itl = self._itl_of.get(model)
        if itl is None:
            itl = self._itl_of[model] = self.itl.labels(model)
        for _ in range(tokens):
            itl.observe(gap_s / tokens)

    def ended(self, report: Report, outcome: FinishReason | PdServeError) -> None:
        name = type(outcome).__name__ if isinstance(outcome, PdServeError) else outcome.value
        model = report.model
        tenant, priority = self._tenant(report.tenant), self._priority(str(report.priority))
        self.requests.labels(model, name, tenant, priority).inc()
        for histogram, value in (
            (self.ttft, report.ttft_s),
            (self.tpot, report.tpot_s),
            (self.e2e, report.e2e_s),
            (self.queue, report.queue_s),
            (self.prefill, report.prefill_s),
            (self.transfer_exposed, report.transfer_exposed_s),
        ):
            if value is not None:
                histogram.labels(model).observe(value)
        if report.bytes_moved:
            self.transfer_bytes.labels(model, report.transfer_path).inc(report.bytes_moved)
        self.prompt_tokens.labels(model).inc(report.prompt_tokens)
        self.cached_tokens.labels(model).inc(report.cached_tokens)
        self.output_tokens.labels(model).inc(report.output_tokens)
        self.attempts.labels(model).inc(report.attempts)
        for what, predicted, measured in (
            ("ttft", report.predicted_ttft_s, report.ttft_s),
            ("tpot", report.predicted_tpot_s, report.tpot_s),
        ):
            if predicted is not None and measured and report.attempts == 1:
                error = abs(predicted - measured) / measured
                self.prediction_error.labels(model, what).observe(error)
        for target, met in (("ttft", report.ttft_met), ("tpot", report.tpot_met)):
            if met is not None:
                self.targets.labels(model, target, "met" if met else "missed").inc()

    def observe_fleet(self, fleet: Fleet) -> None:
        for worker in fleet:
            name = str(worker.id)
            self.worker_up.labels(name, worker.info.role.value, worker.model).set(worker.up)
            for what, fit in worker.latency.fits().items():
                if fit.count:
                    self.latency_error.labels(name, what).set(fit.error)
            beat = worker.heartbeat
            if beat is None:
                continue
            for state in ("free", "held", "cached", "quarantined"):
                self.blocks.labels(name, state).set(getattr(beat.blocks, state))
            self.worker_running.labels(name).set(beat.running)
            self.worker_waiting.labels(name).set(beat.waiting)
            self.worker_step.labels(name).set(beat.step_s)
            self.worker_speed.labels(name).set(beat.tokens_per_s)
            self.prefix_hits.labels(name).set(beat.prefix_hit_tokens)
            self.prefix_queries.labels(name).set(beat.prefix_query_tokens)

    def observe_requests(self, phases: dict[Phase, int], waiting: int) -> None:
        for phase in Phase:
            self.active.labels(phase.value).set(phases.get(phase, 0))
        self.waiting.set(waiting)
