"""Metrics of workers, made when a scrape asks: nothing is kept of a worker that is gone, and nothing is
formatted between scrapes. The event loop publishes what it knows on each tick, as references to frozen data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.fleet import Fleet
from pdserve.core import metric_catalog as catalog
from pdserve.core.messages import Heartbeat, WorkerInfo
from pdserve.core.metric_catalog import Kind

_BLOCK_STATES = ("free", "held", "cached", "quarantined")

Sample = tuple[catalog.Metric, tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class WorkerView:
    info: WorkerInfo
    model: str
    up: bool
    draining: bool
    beat: Heartbeat | None
    latency_errors: tuple[tuple[str, float], ...]


class FleetCollector(Collector):
    """`publish` on the event loop, `collect` on a scrape's thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._workers: tuple[WorkerView, ...] = ()
        registry.register(self)

    def publish(self, fleet: Fleet) -> None:
        self._workers = tuple(
            WorkerView(
                info=worker.info,
                model=worker.model,
                up=worker.up,
                draining=worker.draining,
                beat=worker.heartbeat,
                latency_errors=tuple(
                    (what, fit.error) for what, fit in worker.latency.fits().items() if fit.count
                ),
            )
            for worker in fleet
        )

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for view in self._workers:
            for metric, labels, value in samples_of(view):
                family = families.get(metric.name)
                if family is None:
                    make = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
                    family = families[metric.name] = make(
                        metric.full_name, metric.help, labels=list(metric.labels)
                    )
                family.add_metric(list(labels), value)
        yield from families.values()


def samples_of(view: WorkerView) -> Iterator[Sample]:
    """Every sample of one worker."""
    info, beat = view.info, view.beat
    name, role = str(info.worker), (view.info.role if beat is None or beat.role is None else beat.role).value
    yield catalog.WORKER_UP, (name, role, view.model), view.up
    yield catalog.WORKER_DRAINING, (name,), view.draining
    yield catalog.WORKER_DEVICES, (name, role, info.device or "unknown"), info.num_devices
    for what, error in view.latency_errors:
        yield catalog.LATENCY_ERROR, (name, what), error
    if beat is not None:
        yield from _of_heartbeat(beat, name, role)


def _of_heartbeat(beat: Heartbeat, name: str, role: str) -> Iterator[Sample]:
    for state in _BLOCK_STATES:
        yield catalog.WORKER_BLOCKS, (name, state), getattr(beat.blocks, state)
    own = (name, role)
    yield catalog.WORKER_RUNNING, own, beat.running
    yield catalog.WORKER_WAITING, own, beat.waiting
    yield catalog.WORKER_CONTEXT, own, beat.waiting_tokens
    yield catalog.WORKER_STEP, own, beat.step_s
    yield catalog.WORKER_STEP_AGE, (name,), beat.step_age_s
    yield catalog.WORKER_SPEED, own, beat.tokens_per_s
    yield catalog.WORKER_STEPS, own, beat.steps
    yield catalog.WORKER_TOKENS, own, beat.tokens_computed
    yield catalog.WORKER_BUSY, own, beat.busy_s
    yield catalog.WORKER_PREEMPTIONS, (name,), beat.preemptions
    yield catalog.PREFIX_QUERIES, own, beat.prefix_query_tokens
    yield catalog.PREFIX_HITS, own, beat.prefix_hit_tokens
    tiers = beat.tiers
    yield catalog.TIER_HITS, (name, "host"), tiers.host_hit_tokens
    yield catalog.TIER_HITS, (name, "disk"), tiers.disk_hit_tokens
    yield catalog.TIER_BYTES, (name, "host"), tiers.host_bytes
    yield catalog.TIER_BYTES, (name, "disk"), tiers.disk_bytes
    yield catalog.TIER_MOVED, (name, "stored"), tiers.bytes_stored
    yield catalog.TIER_MOVED, (name, "loaded"), tiers.bytes_loaded
    for why, count in (
        ("dropped", tiers.dropped_blocks),
        ("missed", tiers.missed_blocks),
        ("corrupt", tiers.corrupt_blocks),
        ("io_error", tiers.io_errors),
    ):
        yield catalog.TIER_LOST, (name, why), count
    for pair in beat.pairs:
        yield catalog.PAIR_UP, (name, pair.peer), not pair.error
        if pair.bytes_per_s is not None:
            yield catalog.PAIR_BANDWIDTH, (name, pair.peer, pair.path), pair.bytes_per_s
        if pair.latency_s is not None:
            yield catalog.PAIR_LATENCY, (name, pair.peer, pair.path), pair.latency_s
    for position, (proposed, accepted) in enumerate(zip(beat.proposed_at, beat.accepted_at, strict=True)):
        yield catalog.DRAFTED, (name, str(position)), proposed
        yield catalog.ACCEPTED, (name, str(position)), accepted
    device = beat.device
    if device is not None:
        yield catalog.DEVICE_UTILISATION, own, device.utilisation
        yield catalog.DEVICE_MEMORY, (name, "used"), device.memory_used_bytes
        yield catalog.DEVICE_MEMORY, (name, "total"), device.memory_total_bytes
        if device.power_w is not None:
            yield catalog.DEVICE_POWER, (name,), device.power_w
