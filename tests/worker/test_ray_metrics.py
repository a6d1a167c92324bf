"""What a worker tells Ray is the catalogue's, and counters grow by what was done."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from pdserve.core import metric_catalog as catalog
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Heartbeat, Role
from pdserve.core.metric_catalog import Kind, Metric, Source
from pdserve.core.worker_state import BlockCounts, DeviceUsage
from pdserve.worker import ray_metrics
from pdserve.worker.ray_metrics import Exporter, Instrument, RayMetrics, Status, ray_instrument

BEAT = Heartbeat(
    worker=WorkerId("decode-0"),
    epoch=1,
    blocks=BlockCounts(total=10, free=4, held=3, cached=2, quarantined=1),
    waiting=3,
    running=2,
    waiting_tokens=30,
    step_s=0.02,
    tokens_per_s=100.0,
    prefix_hit_tokens=5,
    prefix_query_tokens=9,
    steps=7,
    tokens_computed=70,
    busy_s=0.5,
    device=DeviceUsage(utilisation=0.5, memory_used_bytes=7, memory_total_bytes=9),
)


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[Metric, float, dict[str, str]]] = []

    def make(self, metric: Metric) -> Instrument:
        return lambda value, tags: self.seen.append((metric, value, tags))

    def values(self, metric: Metric) -> list[float]:
        return [value for seen, value, _ in self.seen if seen is metric]


def test_every_metric_for_ray_is_told_with_its_labels() -> None:
    recorder = Recorder()
    RayMetrics("decode-0", Role.DECODE, "m", recorder.make).update(BEAT)
    told = {metric.name: set(tags) for metric, _, tags in recorder.seen}
    assert told == {metric.name: set(metric.labels) for metric in catalog.of(Source.RAY)}


def test_counters_grow_by_what_was_done_since() -> None:
    recorder = Recorder()
    metrics = RayMetrics("decode-0", Role.DECODE, "m", recorder.make)
    for tokens in (70, 70, 100):
        metrics.update(dataclasses.replace(BEAT, tokens_computed=tokens))
    assert recorder.values(catalog.RAY_TOKENS) == [70, 30]


def test_without_a_device_to_read_its_metrics_are_absent() -> None:
    recorder = Recorder()
    RayMetrics("decode-0", Role.DECODE, "m", recorder.make).update(dataclasses.replace(BEAT, device=None))
    assert recorder.values(catalog.RAY_UTILISATION) == []


def test_rays_own_library_takes_every_metric() -> None:
    for metric in catalog.of(Source.RAY):
        instrument = ray_instrument(metric)
        instrument(1.0, dict.fromkeys(metric.labels, "x"))
        if metric.kind is Kind.GAUGE:
            instrument(0.0, dict.fromkeys(metric.labels, "x"))


def test_the_status_says_how_busy_a_worker_was_since_it_was_asked_last() -> None:
    now = [0.0]
    status = Status(lambda: now[0])
    now[0] = 2.0
    assert status(BEAT) == "busy 25%, 2 running, 3 queued"
    now[0] = 4.0
    assert status(dataclasses.replace(BEAT, draining=True)) == "draining, busy 0%, 2 running, 3 queued"


def test_the_exporter_tells_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics, "_EVERY_S", 0.001)
    told, named = threading.Event(), threading.Event()
    names: list[str] = []

    def name(status: str) -> None:
        names.append(status)
        named.set()

    exporter = Exporter(lambda: BEAT, lambda beat: told.set(), name)
    assert told.wait(10)
    assert named.wait(10)
    exporter.stop()
    exporter._thread.join(10)
    assert not exporter._thread.is_alive()
    assert "2 running" in names[0]
    assert exporter.status == names[-1]
