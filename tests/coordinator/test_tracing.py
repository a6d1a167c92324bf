"""Spans of requests: their tree, their times, the client's context, and where they go."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from coordinator import service
from coordinator.tracing import RequestTracer, make_tracer
from pdserve.core.errors import ConfigError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import TraceExporter, TracingSettings
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from tests.support.deployment import deployed, scenario
from tests.support.model_workers import ModelDecode
from tests.support.registry_world import World, new_request

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"
EPOCH_NS = 1_700_000_000_000_000_000


def spans_of(world: World, name: str = "r", **settings: float) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(TracingSettings(**settings), exporter)  # type: ignore[arg-type]  # floats
    end = world.ends[RequestId(name)]
    tracer.ended(end.report, end.outcome, epoch_ns=EPOCH_NS)
    tracer.close()
    return list(exporter.get_finished_spans())


def world_of(*decoders: str) -> World:
    world = World()
    world.join("prefill-0", Role.PREFILL)
    for name in decoders:
        world.join(name, Role.DECODE)
    return world


def tree(spans: list[ReadableSpan]) -> dict[str, list[str]]:
    """Names of the children of each span, in order of time."""
    names = {span.context.span_id: span.name for span in spans if span.context is not None}
    children: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda s: (s.start_time or 0, s.end_time or 0)):
        if span.parent is not None and span.parent.span_id in names:
            children.setdefault(names[span.parent.span_id], []).append(span.name)
    return children


def test_a_request_is_a_tree_of_spans_that_lie_within_their_parents() -> None:
    world = world_of("decode-0")
    world.submit(new_request(prompt=[5] * 12, max_tokens=6))
    world.run_slowly()
    spans = spans_of(world)
    children = tree(spans)
    assert set(children["request"]) == {"tokenise", "queue", "attempt"}
    assert set(children["attempt"]) == {"reserve", "prefill", "transfer", "decode"}
    assert children["prefill"].count("chunk") == 2
    by_id = {span.context.span_id: span for span in spans if span.context is not None}
    for span in spans:
        assert (span.start_time or 0) <= (span.end_time or 0)
        parent = None if span.parent is None else by_id.get(span.parent.span_id)
        if parent is not None:
            assert (parent.start_time or 0) <= (span.start_time or 0)
            assert (span.end_time or 0) <= (parent.end_time or 0)
    decode = next(span for span in spans if span.name == "decode")
    assert (decode.end_time or 0) - (decode.start_time or 0) >= 3e9
    (root,) = (span for span in spans if span.name == "request")
    assert root.start_time == EPOCH_NS
    assert [event.name for event in root.events] == ["first token"]


def test_the_clients_context_is_the_parent_and_its_sampling_decides() -> None:
    world = world_of("decode-0")
    world.submit(new_request("a", traceparent=PARENT), new_request("b", traceparent=UNSAMPLED))
    world.run()
    (root,) = (span for span in spans_of(world, "a", sample_ratio=0.0) if span.name == "request")
    assert root.context is not None
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert spans_of(world, "b", sample_ratio=1.0) == []


def test_without_a_context_the_ratio_decides() -> None:
    world = world_of("decode-0")
    world.submit(new_request())
    world.run()
    assert spans_of(world, sample_ratio=0.0) == []
    assert spans_of(world, sample_ratio=1.0)


def test_a_retry_is_a_second_attempt_and_the_first_is_marked_as_failed() -> None:
    world = world_of("decode-0", "decode-1")
    world.submit(new_request(prompt=[5] * 12, max_tokens=6))
    world.flush()
    models = {name: world.workers[WorkerId(name)] for name in ("decode-0", "decode-1")}
    world.end_process(next(n for n, m in models.items() if isinstance(m, ModelDecode) and m.reservations))
    world.run()
    attempts = [span for span in spans_of(world) if span.name == "attempt"]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.UNSET]
    assert attempts[0].status.description == "worker_lost"


def test_a_request_that_fails_says_why_and_one_that_is_cancelled_is_no_error() -> None:
    world = world_of("decode-0")
    world.submit(new_request("late", deadline=1.0))
    world.submit(new_request("left"))
    world.cancel("left")
    world.tick(2.0)
    world.run()
    (late,) = (span for span in spans_of(world, "late") if span.name == "request")
    assert late.status.status_code is StatusCode.ERROR
    assert late.attributes is not None
    assert late.attributes["error.type"] == "DeadlineExceeded"
    (left,) = (span for span in spans_of(world, "left") if span.name == "request")
    assert left.status.status_code is StatusCode.UNSET


@scenario
async def test_the_gateway_takes_the_context_from_the_calls_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(TracingSettings(), exporter)
    monkeypatch.setattr(service, "make_tracer", lambda _: tracer)
    async with deployed(tmp_path) as system, grpc.aio.insecure_channel(system.address) as channel:
        call = channel.unary_unary(
            "/pdserve.v1.Generation/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        await call(pb.GenerateRequest(text="hello"), metadata=(("traceparent", PARENT),))
    names = {span.name for span in exporter.get_finished_spans()}
    assert {"request", "tokenise", "queue", "attempt", "prefill", "decode"} <= names
    ids = {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans() if span.context}
    assert ids == {PARENT.split("-")[1]}


def test_a_file_gets_a_span_per_line(tmp_path: Path) -> None:
    world = world_of("decode-0")
    world.submit(new_request())
    world.run()
    path = tmp_path / "spans.jsonl"
    tracer = make_tracer(TracingSettings(exporter=TraceExporter.FILE, file=str(path)))
    assert tracer is not None
    end = world.ends[RequestId("r")]
    tracer.ended(end.report, end.outcome, epoch_ns=EPOCH_NS)
    tracer.close()
    names = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert "request" in names
    assert "decode" in names


def test_a_file_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracing\.file"):
        make_tracer(TracingSettings(exporter=TraceExporter.FILE, file=str(tmp_path / "no" / "spans")))


def test_without_an_exporter_there_is_no_tracer() -> None:
    assert make_tracer(TracingSettings()) is None
