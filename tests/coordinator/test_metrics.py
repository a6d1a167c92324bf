"""What a scrape shows after what happened: the whole catalogue, and nothing that is not in it."""

from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.account import Leg
from coordinator.cost import bill
from coordinator.fast_histogram import FastHistograms
from coordinator.fetch_tally import FetchOutcome, FetchTally
from coordinator.fleet import Fleet, WorkerState
from coordinator.metrics import Metrics
from coordinator.report import Report
from pdserve.core import metric_catalog as catalog
from pdserve.core.errors import Overload, Overloaded, RequestCancelled
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.lifecycle import Phase
from pdserve.core.messages import FinishReason, Heartbeat, Role, TransferDone
from pdserve.core.metric_catalog import Kind, Source
from pdserve.core.operation_settings import CostSettings
from pdserve.core.worker_state import BlockCounts, DeviceUsage, PairState
from tests.support.model_workers import worker_info

RID = RequestId("r1")
PRICES = CostSettings(device_hour=3.6, prefill_device_hour=7.2, kv_gib_hour=36.0)


def leg(epoch: int = 0, **changes: object) -> Leg:
    values: dict[str, object] = {
        "attempt": AttemptId(RID, epoch),
        "decode_worker": "decode-0",
        "prefill_worker": "prefill-0",
        "placed_at": 0.0,
        "reserved_at": 0.1,
        "prefill_began": 0.2,
        "prefill_ended": 0.4,
        "chunks": ((0.4, 100),),
        "arrived_at": 0.5,
        "ended_at": 1.0,
        "prefill_queue_s": 0.1,
        "transfer": TransferDone(
            attempt=AttemptId(RID, epoch), bytes_moved=4096, exposed_s=0.01, busy_s=0.02, path="shm"
        ),
        "cached_tokens": 0,
        "output_tokens": 10,
        "prefill_device_s": 2.0,
        "prefill_on": Role.PREFILL,
        "decode_device_s": 3.0,
        "decode_on": Role.DECODE,
        "kv_byte_s": 2.0**30,
        "repeated": False,
        "failure": "",
    }
    return Leg(**{**values, **changes})  # type: ignore[arg-type]  # a test's shorthand


def report(*legs: Leg, **changes: object) -> Report:
    values: dict[str, object] = {
        "id": RID,
        "model": "m",
        "tenant": "acme",
        "priority": 0,
        "sla_class": "interactive",
        "prompt_tokens": 100,
        "output_tokens": 10,
        "attempts": max(len(legs), 1),
        "e2e_s": 1.0,
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "ttft_s": 0.4,
        "tpot_s": 0.05,
        "ttft_target_s": 0.3,
        "tpot_target_s": 0.1,
        "predicted_ttft_s": 0.5,
        "predicted_tpot_s": 0.04,
        "cached_tokens": 64,
        "migrations": 1,
        "preemptions": 1,
        "legs": legs,
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]  # a test's shorthand


def fleet_of(*names: str) -> Fleet:
    fleet = Fleet()
    for name in names:
        role = Role.PREFILL if name.startswith("prefill") else Role.DECODE
        state = WorkerState(info=worker_info(name, role), model="m")
        beat = Heartbeat(
            worker=WorkerId(name),
            epoch=1,
            blocks=BlockCounts(total=10, free=4, held=3, cached=2, quarantined=1),
            waiting=1,
            running=2,
            waiting_tokens=30,
            step_s=0.02,
            tokens_per_s=100.0,
            prefix_hit_tokens=5,
            prefix_query_tokens=9,
            steps=7,
            tokens_computed=70,
            busy_s=0.7,
            proposed_at=[3, 2],
            accepted_at=[2, 1],
            pairs=[PairState(peer=WorkerId("peer-0"), path="shm", bytes_per_s=9e9, latency_s=1e-5)],
            device=DeviceUsage(utilisation=0.5, memory_used_bytes=1, memory_total_bytes=2, power_w=300.0),
        )
        state.heard(beat)
        fleet.add(state)
    return fleet


def scrape(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels."""
    page = generate_latest(metrics.registry).decode()
    return {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def busy_metrics() -> Metrics:
    """Everything has happened at least once."""
    metrics = Metrics(PRICES)
    metrics.tokenise.labels("m").observe(0.001)
    metrics.gap("m", 0.1, 2)
    metrics.ended(report(leg(failure="transfer"), leg(1, repeated=True)), FinishReason.STOP)
    metrics.ended(report(phase=Phase.REJECTED), Overloaded("full"))
    metrics.errors.labels("Overloaded").inc()
    metrics.refusals.labels("decode-0", "no_blocks").inc()
    fleet = fleet_of("prefill-0", "decode-0")
    for worker in fleet:
        for fit in worker.latency.fits().values():
            fit.count = 1
    metrics.observe_fleet(fleet)
    metrics.observe_requests({Phase.DECODING: 3}, waiting=2)
    tally = FetchTally()
    tally.ended["m", FetchOutcome.ARRIVED] += 1
    tally.moved("m", "shm", 4096, 0.01)
    metrics.observe_fetches(tally)
    metrics.worker_started("decode-0", {"process": 2.0, "weights": 1.5})
    metrics.planner_plans.labels("m", "keep").inc()
    metrics.planner_rate.labels("m").set(1.0)
    metrics.planner_capacity.labels("m", "now").set(2.0)
    metrics.planner_wanted.labels("m", "decode").set(3.0)
    return metrics


def test_a_workers_next_start_replaces_the_phases_of_the_former_one() -> None:
    metrics = Metrics(PRICES)
    metrics.worker_started("decode-0", {"process": 2.0, "kernels": 30.0})
    metrics.worker_started("decode-0", {"process": 3.0})
    page = generate_latest(metrics.registry).decode()
    assert 'pdserve_worker_start_seconds{phase="process",worker="decode-0"} 3.0' in page
    assert "kernels" not in page.replace(catalog.WORKER_START.help, "")


def test_a_scrape_shows_every_metric_of_the_catalogue_and_no_other_with_its_kind_labels_and_words() -> None:
    page = generate_latest(busy_metrics().registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    wanted = catalog.of(Source.REQUESTS, Source.COST, Source.WORKERS)
    assert families.keys() == {metric.full_name for metric in wanted}
    for metric in wanted:
        family = families[metric.full_name]
        assert (family.type, family.documentation) == (metric.kind.value, metric.help)
        assert family.samples, f"nothing was observed of {metric.name}"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_names_follow_prometheus() -> None:
    for metric in catalog.CATALOG:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert not metric.name.endswith("_total")
        assert metric.help
        assert not metric.help.endswith(".")
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        if metric.unit in ("seconds", "bytes"):
            assert metric.unit in metric.name
    assert len({metric.exposed for metric in catalog.CATALOG}) == len(catalog.CATALOG)


def test_tenants_beyond_the_limit_count_as_other() -> None:
    metrics = Metrics()
    for number in range(catalog.MAX_TENANTS + 5):
        metrics.ended(report(tenant=f"t{number}"), FinishReason.STOP)
    samples = scrape(metrics)
    tokens = {key: value for key, value in samples.items() if key.startswith("pdserve_output_tokens_total")}
    assert len(tokens) == catalog.MAX_TENANTS + 1
    assert [value for key, value in tokens.items() if "'other'" in key] == [50.0]


def test_a_worker_that_is_gone_has_no_series() -> None:
    metrics = Metrics()
    fleet = fleet_of("prefill-0", "decode-0")
    metrics.observe_fleet(fleet)
    assert any("decode-0" in key for key in scrape(metrics))
    fleet.forget(WorkerId("decode-0"))
    metrics.observe_fleet(fleet)
    assert not any("decode-0" in key for key in scrape(metrics))


def test_a_refused_request_counts_as_an_admission_refusal_by_its_reason() -> None:
    metrics = Metrics()
    metrics.ended(report(phase=Phase.REJECTED), Overloaded("full", why=Overload.QUEUE_FULL))
    metrics.ended(report(phase=Phase.FAILED), Overloaded("in the middle", why=Overload.QUEUE_FULL))
    labels = "[('model', 'm'), ('reason', 'queue_full'), ('tenant', 'acme')]"
    assert scrape(metrics)[f"pdserve_admission_refusals_total{labels}"] == 1.0


def test_outputs_that_came_together_count_for_their_share_of_the_gap() -> None:
    metrics = Metrics()
    metrics.gap("m", 0.08, 4)
    samples = scrape(metrics)
    assert samples["pdserve_itl_seconds_count[('model', 'm')]"] == 4
    assert samples["pdserve_itl_seconds_sum[('model', 'm')]"] == pytest.approx(0.08)
    assert samples["pdserve_itl_seconds_bucket[('le', '0.02'), ('model', 'm')]"] == 4
    assert samples["pdserve_itl_seconds_bucket[('le', '0.01'), ('model', 'm')]"] == 0


def test_the_fast_histogram_counts_as_the_library_does() -> None:
    pages = []
    metric = catalog.TRANSFER_EXPOSED
    for make in (
        lambda registry: FastHistograms(metric, registry),
        lambda registry: Histogram(
            metric.full_name, metric.help, metric.labels, buckets=metric.buckets, registry=registry
        ),
    ):
        registry = CollectorRegistry()
        histogram = make(registry)
        for value in [0.0, 0.001, 0.0011, 0.02, 4.9, 5.0, 77.0]:
            histogram.labels("m", "shm").observe(value)
        page = generate_latest(registry).decode().splitlines()
        pages.append([line for line in page if "_created" not in line])
    assert pages[0] == pages[1]


def test_a_request_costs_its_device_time_and_its_kv_at_the_prices_of_each_role() -> None:
    charged = bill(report(leg()), FinishReason.STOP, PRICES)
    assert {(item.activity, item.use): item.money for item in charged.items} == {
        ("prefill", "answer"): pytest.approx(2.0 * 7.2 / 3600),
        ("decode", "answer"): pytest.approx(3.0 * 3.6 / 3600),
        ("kv", "answer"): pytest.approx(36.0 / 3600),
    }
    assert charged.device_s == 5.0
    assert charged.wasted_device_s == 0.0


def test_reading_a_prompt_again_is_waste_and_what_a_cancelled_request_took_is_all_waste() -> None:
    retried = bill(report(leg(failure="worker_lost"), leg(1, repeated=True)), FinishReason.STOP, PRICES)
    assert retried.wasted_device_s == 2.0
    assert retried.device_s == 10.0
    cancelled = bill(report(leg()), RequestCancelled("gone"), PRICES)
    assert cancelled.wasted_device_s == cancelled.device_s == 5.0


def test_expiry_is_told_apart_from_transport_failure() -> None:
    metrics = Metrics()
    metrics.ended(report(leg(failure="lease_expired"), leg(1, failure="transfer"), leg(2)), FinishReason.STOP)
    samples = scrape(metrics)
    for reason in ("lease_expired", "transfer"):
        key = f"pdserve_attempt_failures_total[('model', 'm'), ('reason', '{reason}')]"
        assert samples[key] == 1.0
