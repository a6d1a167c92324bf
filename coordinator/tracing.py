"""OpenTelemetry spans of requests, made when a request ends from what workers reported meanwhile.

    request (the client's traceparent is its parent)
      tokenise
      queue                            once per attempt: until a worker has room
      attempt                          placement to end; its failure is its status
        reserve                        a decode worker sets blocks apart
        prefill                        on its prefill worker
          chunk                        once per chunk of the prompt
        transfer                       what prefill did not hide of it; path and bytes in attributes
        decode                         from the arrival of the KV to the last token

The coordinator makes all of them: workers report every time in messages that they send anyway, so no trace
context travels to them and a step makes no span. Building spans takes place on a thread of its own.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from coordinator.account import Leg
from coordinator.report import Report
from pdserve import __version__
from pdserve.core.errors import ConfigError, PdServeError, RequestCancelled
from pdserve.core.logs import about
from pdserve.core.messages import FinishReason
from pdserve.core.operation_settings import TraceExporter, TracingSettings

log = logging.getLogger(__name__)

_MAX_QUEUED: Final = 10_000
"""Ended requests whose spans are not made yet; more are dropped, and said to be."""
_PROPAGATOR: Final = TraceContextTextMapPropagator()

Ended = tuple[Report, FinishReason | PdServeError, int]


class RequestTracer:
    """`ended` on the event loop; spans are made and exported elsewhere."""

    def __init__(self, settings: TracingSettings, exporter: SpanExporter) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({"service.name": "pdserve", "service.version": __version__}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pdserve", __version__)
        self._queue: queue.Queue[Ended | None] = queue.Queue(_MAX_QUEUED)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)
        self._thread.start()

    def ended(self, report: Report, outcome: FinishReason | PdServeError, *, epoch_ns: int) -> None:
        """epoch_ns: wall-clock time, in nanoseconds, of zero on the report's clock."""
        try:
            self._queue.put_nowait((report, outcome, epoch_ns))
        except queue.Full:
            if not self._dropped:
                log.warning("spans are made more slowly than requests end: some requests have none")
            self._dropped += 1

    def close(self) -> None:
        """Make and export what is queued. Blocks for some seconds at most."""
        self._queue.put(None)
        self._thread.join(5.0)
        self._provider.shutdown()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._trace(*item)
            except Exception:  # the thread's outermost loop: one request has no spans, the next may
                log.exception("making spans failed", extra=about(item[0].id))

    # --- spans --------------------------------------------------------------------------------------

    def _trace(self, report: Report, outcome: FinishReason | PdServeError, epoch_ns: int) -> None:
        clock = _Clock(epoch_ns)
        parent = _PROPAGATOR.extract({"traceparent": report.traceparent}) if report.traceparent else Context()
        root = self._tracer.start_span(
            "request",
            parent,
            SpanKind.SERVER,
            attributes=_request_attributes(report, outcome),
            start_time=clock(report.created),
        )
        if root.is_recording():
            within = set_span_in_context(root)
            self._span("tokenise", within, clock, report.created, report.submitted)
            queued_from = report.submitted
            for leg in report.legs:
                self._span("queue", within, clock, queued_from, leg.placed_at)
                self._leg(leg, within, clock)
                queued_from = leg.ended_at
            if not report.legs:
                self._span("queue", within, clock, queued_from, report.ended)
            if report.first_token_at is not None:
                root.add_event("first token", timestamp=clock(report.first_token_at))
            if isinstance(outcome, PdServeError) and not isinstance(outcome, RequestCancelled):
                root.set_status(Status(StatusCode.ERROR, str(outcome)))
        root.end(clock(report.ended))

    def _leg(self, leg: Leg, within: Context, clock: _Clock) -> None:
        attempt = self._tracer.start_span(
            "attempt",
            within,
            attributes={
                "pdserve.attempt": str(leg.attempt),
                "pdserve.prefill_worker": leg.prefill_worker or leg.decode_worker,
                "pdserve.decode_worker": leg.decode_worker,
            },
            start_time=clock(leg.placed_at),
        )
        inside = set_span_in_context(attempt)
        self._span("reserve", inside, clock, leg.placed_at, leg.reserved_at)
        self._prefill(leg, inside, clock)
        done = leg.transfer
        if done is not None and leg.prefill_ended is not None and leg.arrived_at is not None:
            moved: dict[str, AttributeValue] = {
                "pdserve.transfer.path": done.path,
                "pdserve.transfer.bytes": done.bytes_moved,
                "pdserve.transfer.busy_s": done.busy_s,
            }
            self._span("transfer", inside, clock, leg.prefill_ended, leg.arrived_at, moved)
        writes_from = leg.prefill_ended if leg.arrived_at is None else leg.arrived_at
        if writes_from is not None and leg.output_tokens:
            tokens = {"pdserve.output_tokens": leg.output_tokens}
            self._span("decode", inside, clock, writes_from, leg.ended_at, tokens)
        if leg.failure:
            attempt.set_status(Status(StatusCode.ERROR, leg.failure))
        attempt.end(clock(leg.ended_at))

    def _prefill(self, leg: Leg, inside: Context, clock: _Clock) -> None:
        if leg.prefill_began is None:
            return
        until = leg.ended_at if leg.prefill_ended is None else leg.prefill_ended
        about: dict[str, AttributeValue] = {
            "pdserve.worker": leg.prefill_worker or leg.decode_worker,
            "pdserve.queue_s": leg.prefill_queue_s,
        }
        span = self._span("prefill", inside, clock, leg.prefill_began, until, about)
        if span is None:
            return
        ends = [leg.prefill_began, *(at for at, _ in leg.chunks)]
        counts = [done for _, done in leg.chunks]
        for (start, end), done in zip(itertools.pairwise(ends), counts, strict=True):
            self._span(
                "chunk", set_span_in_context(span), clock, start, end, {"pdserve.prompt_tokens_done": done}
            )

    def _span(
        self,
        name: str,
        within: Context,
        clock: _Clock,
        start: float | None,
        end: float | None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Span | None:
        """None where it did not come to that. An end that was heard of before its start is its start."""
        if start is None or end is None:
            return None
        span = self._tracer.start_span(name, within, attributes=attributes, start_time=clock(start))
        span.end(clock(max(start, end)))
        return span


class _Clock:
    """Nanoseconds since 1970 of a time on the report's clock."""

    def __init__(self, epoch_ns: int) -> None:
        self._epoch_ns = epoch_ns

    def __call__(self, at: float) -> int:
        return self._epoch_ns + int(at * 1e9)


def _request_attributes(report: Report, outcome: FinishReason | PdServeError) -> dict[str, AttributeValue]:
    """Names of OpenTelemetry's conventions for generative AI where there is one."""
    wanted: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": report.model,
        "gen_ai.usage.input_tokens": report.prompt_tokens,
        "gen_ai.usage.output_tokens": report.output_tokens,
        "gen_ai.server.time_to_first_token": report.ttft_s,
        "gen_ai.server.time_per_output_token": report.tpot_s,
        "pdserve.request": str(report.id),
        "pdserve.tenant": report.tenant or None,
        "pdserve.sla_class": report.sla_class or None,
        "pdserve.priority": report.priority,
        "pdserve.attempts": report.attempts,
        "pdserve.cached_tokens": report.cached_tokens,
        "pdserve.ttft_met": report.ttft_met,
        "pdserve.tpot_met": report.tpot_met,
    }
    if isinstance(outcome, PdServeError):
        wanted["error.type"] = type(outcome).__name__
    else:
        wanted["gen_ai.response.finish_reasons"] = (outcome.value,)
    return {name: value for name, value in wanted.items() if value is not None}


def make_tracer(settings: TracingSettings) -> RequestTracer | None:
    """As configured; None without an exporter. Raises `ConfigError` where one is not installed."""
    exporter = _exporter(settings)
    return None if exporter is None else RequestTracer(settings, exporter)


def _exporter(settings: TracingSettings) -> SpanExporter | None:
    match settings.exporter:
        case TraceExporter.NONE:
            return None
        case TraceExporter.CONSOLE:
            return ConsoleSpanExporter()
        case TraceExporter.FILE:
            return _FileExporter(Path(settings.file or ""))
        case TraceExporter.OTLP_GRPC | TraceExporter.OTLP_HTTP:
            return _otlp(settings)


def _otlp(settings: TracingSettings) -> SpanExporter:
    # Here, not at the top: both are optional.
    try:
        if settings.exporter is TraceExporter.OTLP_GRPC:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

            return OverGrpc(endpoint=settings.endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        return OverHttp(endpoint=None if settings.endpoint is None else _traces_url(settings.endpoint))
    except ImportError as error:
        raise ConfigError(
            f"tracing.exporter: {settings.exporter} needs `pip install pdserve[otel]` ({error})"
        ) from error


def _traces_url(endpoint: str) -> str:
    """The exporter posts to what it is given; a collector's address alone stands for its usual path."""
    bare = urlsplit(endpoint).path.strip("/") == ""
    return endpoint.rstrip("/") + "/v1/traces" if bare else endpoint


class _FileExporter(ConsoleSpanExporter):
    """One span per line, as JSON."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: IO[str] = path.open("a")
        except OSError as error:
            raise ConfigError(f"tracing.file: {path}: {error.strerror}") from error
        super().__init__(out=self._file, formatter=lambda span: span.to_json(indent=None) + "\n")

    def shutdown(self) -> None:
        self._file.close()
