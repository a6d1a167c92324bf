"""Spans reach a collector through the wire, over both of OTLP's transports, as one tree per request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from coordinator.tracing import RequestTracer, make_tracer
from pdserve.core.ids import RequestId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import TraceExporter, TracingSettings
from tests.support.registry_world import World, new_request

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Take = Callable[[ExportTraceServiceRequest], None]


@contextlib.contextmanager
def over_grpc(take: Take) -> Iterator[str]:
    class Receiver(TraceServiceServicer):
        def Export(
            self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
        ) -> ExportTraceServiceResponse:
            take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Receiver(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def over_http(take: Take) -> Iterator[str]:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if found:
                take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Not to the terminal."""

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def finished_world() -> World:
    """One request that was read on one worker and written on another."""
    world = World()
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    world.submit(new_request(prompt=[5] * 12, max_tokens=6, traceparent=PARENT))
    world.run_slowly()
    return world


def texts(span: Span) -> dict[str, str]:
    return {one.key: one.value.string_value for one in span.attributes if one.value.HasField("string_value")}


@pytest.mark.parametrize(
    ("exporter", "receiver", "path"),
    [
        (TraceExporter.OTLP_GRPC, over_grpc, ""),
        (TraceExporter.OTLP_HTTP, over_http, ""),
        (TraceExporter.OTLP_HTTP, over_http, "/v1/traces"),
    ],
)
def test_a_collector_gets_one_trace_from_the_gateway_to_the_last_token(
    exporter: TraceExporter, receiver: Callable[[Take], contextlib.AbstractContextManager[str]], path: str
) -> None:
    got: list[ExportTraceServiceRequest] = []
    end = finished_world().ends[RequestId("r")]
    with receiver(got.append) as address:
        tracer = make_tracer(TracingSettings(exporter=exporter, endpoint=address + path))
        assert isinstance(tracer, RequestTracer)
        tracer.ended(end.report, end.outcome, epoch_ns=1_700_000_000_000_000_000)
        tracer.close()
    resources = [resource for request in got for resource in request.resource_spans]
    assert {
        one.value.string_value
        for resource in resources
        for one in resource.resource.attributes
        if one.key == "service.name"
    } == {"pdserve"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {PARENT.split("-")[1]}
    by_name = {span.name: span for span in spans}
    request, attempt = by_name["request"], by_name["attempt"]
    assert request.parent_span_id.hex() == PARENT.split("-")[2]
    assert attempt.parent_span_id == request.span_id
    assert texts(request)["pdserve.request"] == "r"
    assert texts(attempt) == {
        "pdserve.attempt": "r#0",
        "pdserve.prefill_worker": "prefill-0",
        "pdserve.decode_worker": "decode-0",
    }
    for name in ("reserve", "prefill", "transfer", "decode"):
        assert by_name[name].parent_span_id == attempt.span_id
    assert texts(by_name["prefill"])["pdserve.worker"] == "prefill-0"
    assert texts(by_name["transfer"])["pdserve.transfer.path"]
