"""The coordinator's instruments, made from the catalogue. Labels whose values clients choose are bounded.

Work per token is one `bisect` (`gap`); the rest happens when a sample ends, or on a tick four times a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

from coordinator.account import REASONS
from coordinator.cost import Bill, bill
from coordinator.fast_histogram import FastHistogram, FastHistograms
from coordinator.fetch_tally import FetchOutcome, FetchTally
from coordinator.fleet import Fleet
from coordinator.fleet_metrics import FleetCollector
from coordinator.report import Report
from pdserve.core import metric_catalog as catalog
from pdserve.core.errors import Overloaded, PdServeError
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import FinishReason, Role
from pdserve.core.operation_settings import CostSettings


class Bounded:
    """The first values seen keep their names."""

    def __init__(self, limit: int) -> None:
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

    def __init__(self, prices: CostSettings | None = None) -> None:
        # A series more per counter, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's gap
        self.registry: Final = CollectorRegistry()
        self._prices = prices or CostSettings()
        self._tenant, self._priority = Bounded(catalog.MAX_TENANTS), Bounded(catalog.MAX_PRIORITIES)
        self._class = Bounded(catalog.MAX_CLASSES)
        self._itl = FastHistograms(catalog.ITL, self.registry)
        self._itl_of: dict[str, FastHistogram] = {}
        self._fleet = FleetCollector(self.registry)
        self._start_phases: dict[str, tuple[str, ...]] = {}
        self._shown: dict[tuple[Counter, tuple[str, ...]], float] = {}
        self._instruments()
        for role, price in (
            (Role.PREFILL, self._prices.prefill_hour),
            (Role.DECODE, self._prices.device_hour),
        ):
            self.device_price.labels(role.value, self._prices.currency).set(price)

    def _instruments(self) -> None:
        self.ttft = self._histogram(catalog.TTFT)
        self.tpot = self._histogram(catalog.TPOT)
        self.e2e = self._histogram(catalog.E2E)
        self.queue = self._histogram(catalog.QUEUE)
        self.prefill = self._histogram(catalog.PREFILL)
        self.transfer_exposed = self._histogram(catalog.TRANSFER_EXPOSED)
        self.tokenise = self._histogram(catalog.TOKENISE)
        self.prompt_length = self._histogram(catalog.PROMPT_LENGTH)
        self.output_length = self._histogram(catalog.OUTPUT_LENGTH)
        self.fetches = self._counter(catalog.PREFIX_FETCHES)
        self.fetched_bytes = self._counter(catalog.PREFIX_FETCHED_BYTES)
        self.fetch_busy = self._counter(catalog.PREFIX_FETCH_BUSY)
        self.prediction_error = self._histogram(catalog.PREDICTION_ERROR)
        self.requests = self._counter(catalog.REQUESTS)
        self.errors = self._counter(catalog.ERRORS)
        self.targets = self._counter(catalog.TARGETS)
        self.admission_refusals = self._counter(catalog.ADMISSION_REFUSALS)
        self.attempts = self._counter(catalog.ATTEMPTS)
        self.attempt_failures = self._counter(catalog.ATTEMPT_FAILURES)
        self.retries = self._counter(catalog.RETRIES)
        self.migrations = self._counter(catalog.MIGRATIONS)
        self.preemptions = self._counter(catalog.PREEMPTIONS)
        self.prompt_tokens = self._counter(catalog.PROMPT_TOKENS)
        self.cached_tokens = self._counter(catalog.CACHED_TOKENS)
        self.output_tokens = self._counter(catalog.OUTPUT_TOKENS)
        self.transfer_bytes = self._counter(catalog.TRANSFER_BYTES)
        self.transfer_busy = self._counter(catalog.TRANSFER_BUSY)
        self.device_seconds = self._counter(catalog.DEVICE_SECONDS)
        self.kv_byte_seconds = self._counter(catalog.KV_BYTE_SECONDS)
        self.cost = self._counter(catalog.COST)
        self.refusals = self._counter(catalog.REFUSALS)
        self.device_price = self._gauge(catalog.DEVICE_PRICE)
        self.active = self._gauge(catalog.ACTIVE)
        self.waiting = self._gauge(catalog.WAITING)
        self.queue_limit = self._gauge(catalog.QUEUE_LIMIT)
        self.planner_plans = self._counter(catalog.PLANNER_PLANS)
        self.planner_rate = self._gauge(catalog.PLANNER_RATE)
        self.planner_capacity = self._gauge(catalog.PLANNER_CAPACITY)
        self.planner_wanted = self._gauge(catalog.PLANNER_WANTED)
        self.loop_lag = self._gauge(catalog.LOOP_LAG)
        self._worker_start = self._gauge(catalog.WORKER_START)

    def _histogram(self, metric: catalog.Metric) -> FastHistograms:
        return FastHistograms(metric, self.registry)

    def _counter(self, metric: catalog.Metric) -> Counter:
        return Counter(metric.full_name, metric.help, metric.labels, registry=self.registry)

    def worker_started(self, worker: str, seconds: Mapping[str, float]) -> None:
        """By phase; phases of its former start that this one did not have are no more."""
        for phase in self._start_phases.pop(worker, ()):
            self._worker_start.remove(worker, phase)
        self._start_phases[worker] = tuple(seconds)
        for phase, took in seconds.items():
            self._worker_start.labels(worker, phase).set(took)

    def _gauge(self, metric: catalog.Metric) -> Gauge:
        return Gauge(metric.full_name, metric.help, metric.labels, registry=self.registry)

    def serves(self, model: str) -> None:
        """Series of what has not happened yet begin at zero, so that the first time shows as an increase."""
        for reason in REASONS:
            self.attempt_failures.labels(model, reason)
        for outcome in FetchOutcome:
            self.fetches.labels(model, outcome.value)
        for counter in (self.attempts, self.retries, self.migrations, self.preemptions):
            counter.labels(model)

    # --- per token ----------------------------------------------------------------------------------

    def gap(self, model: str, gap_s: float, tokens: int) -> None:
        """`tokens` came together, `gap_s` after the output before them: each counts for its share."""
        itl = self._itl_of.get(model)
        if itl is None:
            itl = self._itl_of[model] = self._itl.labels(model)
        itl.observe(gap_s / tokens, tokens)

    # --- per sample ---------------------------------------------------------------------------------

    def ended(self, report: Report, outcome: FinishReason | PdServeError) -> Bill:
        """Count a sample that ended, once. Returns what it cost."""
        name = type(outcome).__name__ if isinstance(outcome, PdServeError) else outcome.value
        model = report.model
        tenant, priority = self._tenant(report.tenant), self._priority(str(report.priority))
        sla_class = self._class(report.sla_class)
        self.requests.labels(model, name, tenant, priority).inc()
        if report.phase is Phase.REJECTED:
            reason = outcome.why.value if isinstance(outcome, Overloaded) else name
            self.admission_refusals.labels(model, tenant, reason).inc()
        self._times(report)
        self._tokens(report, tenant)
        self._attempts(report)
        self._transfers(report)
        for target, met in (("ttft", report.ttft_met), ("tpot", report.tpot_met)):
            if met is not None:
                result = "met" if met else "missed"
                self.targets.labels(model, tenant, sla_class, target, result).inc()
        return self._charge(report, outcome, tenant)

    def _times(self, report: Report) -> None:
        for histogram, value in (
            (self.ttft, report.ttft_s),
            (self.tpot, report.tpot_s),
            (self.e2e, report.e2e_s),
            (self.queue, report.queue_s),
            (self.prefill, report.prefill_s),
        ):
            if value is not None:
                histogram.labels(report.model).observe(value)
        for what, predicted, measured in (
            ("ttft", report.predicted_ttft_s, report.ttft_s),
            ("tpot", report.predicted_tpot_s, report.tpot_s),
        ):
            if predicted is not None and measured and report.attempts == 1:
                error = abs(predicted - measured) / measured
                self.prediction_error.labels(report.model, what).observe(error)

    def _tokens(self, report: Report, tenant: str) -> None:
        model = report.model
        self.prompt_tokens.labels(model, tenant).inc(report.prompt_tokens)
        self.cached_tokens.labels(model, tenant).inc(report.cached_tokens)
        self.output_tokens.labels(model, tenant).inc(report.output_tokens)
        self.prompt_length.labels(model).observe(report.prompt_tokens)
        self.output_length.labels(model).observe(report.output_tokens)

    def _attempts(self, report: Report) -> None:
        self.attempts.labels(report.model).inc(report.attempts)
        if report.attempts > 1:
            self.retries.labels(report.model).inc(report.attempts - 1)
        if report.migrations:
            self.migrations.labels(report.model).inc(report.migrations)
        if report.preemptions:
            self.preemptions.labels(report.model).inc(report.preemptions)
        for leg in report.legs:
            if leg.failure:
                self.attempt_failures.labels(report.model, leg.failure).inc()

    def _transfers(self, report: Report) -> None:
        for leg in report.legs:
            done = leg.transfer
            if done is not None and done.bytes_moved:
                labels = (report.model, done.path)
                self.transfer_bytes.labels(*labels).inc(done.bytes_moved)
                self.transfer_busy.labels(*labels).inc(done.busy_s)
                self.transfer_exposed.labels(*labels).observe(done.exposed_s)

    def _charge(self, report: Report, outcome: FinishReason | PdServeError, tenant: str) -> Bill:
        charged = bill(report, outcome, self._prices)
        for item in charged.items:
            if item.activity == "kv":
                self.kv_byte_seconds.labels(report.model, tenant).inc(item.amount)
            else:
                self.device_seconds.labels(report.model, tenant, item.activity, item.use).inc(item.amount)
            self.cost.labels(report.model, tenant, item.activity, item.use).inc(item.money)
        return charged

    # --- on a tick ----------------------------------------------------------------------------------

    def observe_fleet(self, fleet: Fleet) -> None:
        self._fleet.publish(fleet)

    def observe_requests(self, phases: dict[Phase, int], waiting: int) -> None:
        for phase in Phase:
            self.active.labels(phase.value).set(phases.get(phase, 0))
        self.waiting.set(waiting)

    def observe_fetches(self, tally: FetchTally) -> None:
        """What was counted since the last time."""
        for (model, outcome), count in tally.ended.items():
            self._raise_to(self.fetches, (model, outcome.value), count)
        for labels, size_bytes in tally.bytes_moved.items():
            self._raise_to(self.fetched_bytes, labels, size_bytes)
        for labels, busy_s in tally.busy_s.items():
            self._raise_to(self.fetch_busy, labels, busy_s)

    def _raise_to(self, counter: Counter, labels: tuple[str, ...], value: float) -> None:
        """A total that is kept elsewhere."""
        shown = self._shown.get((counter, labels), 0.0)
        if value > shown:
            counter.labels(*labels).inc(value - shown)
            self._shown[counter, labels] = value
