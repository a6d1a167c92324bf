"""docs/metrics.md, from the catalogue of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pdserve.core import metric_catalog as catalog
from pdserve.core.metric_catalog import Kind, Metric, Source

_ABOUT: Final[dict[Source, str]] = {
    Source.REQUESTS: "Counted when a sample (an answer; a request with `n` has n) ends, but for the gauges "
    "and `pdserve_itl_seconds`.",
    Source.COST: "Device time is a share of steps: a worker's seconds per token, as its heartbeats say, "
    "times the tokens it computed for the sample. All shares add up to the workers' busy time; idle "
    "time is nobody's, and is what is left of `pdserve_worker_devices`. Prices are in the configuration's "
    "`cost` section.",
    Source.WORKERS: "As of a worker's last heartbeat. Counters begin with the worker's process. A worker "
    "that is gone has no series.",
    Source.RAY: "The same workers, seen from their own processes, on the port where Ray exports metrics: so "
    "they show in Ray's dashboard, and while the coordinator is away.",
}


def metrics_page() -> str:
    lines = [
        "# Metrics",
        "",
        "Generated from `pdserve/core/metric_catalog.py` by `make docs`; do not edit.",
        "",
        "`pdserve serve` prints the address of its Prometheus page (`coordinator.metrics_port`). How to "
        "watch them, and what each alert means: [operations.md](operations.md).",
        "",
        f"Values that clients choose are bounded: after {catalog.MAX_TENANTS} tenants, "
        f"{catalog.MAX_PRIORITIES} priorities and {catalog.MAX_CLASSES} classes, further ones are `other`.",
    ]
    for source in Source:
        lines += ["", f"## {source.value}", "", _ABOUT[source], "", *_table(source)]
    lines += ["", "## Buckets", "", *_buckets()]
    return "\n".join(lines) + "\n"


def _table(source: Source) -> Iterator[str]:
    yield "| Name | Kind | Unit | Labels | Meaning |"
    yield "|---|---|---|---|---|"
    for metric in catalog.of(source):
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        meaning = metric.help.replace("|", "\\|")
        yield f"| `{metric.exposed}` | {metric.kind} | {metric.unit} | {labels} | {meaning} |"


def _buckets() -> Iterator[str]:
    histograms: dict[tuple[float, ...], list[Metric]] = {}
    for metric in catalog.CATALOG:
        if metric.kind is Kind.HISTOGRAM:
            histograms.setdefault(metric.buckets, []).append(metric)
    for bounds, metrics in histograms.items():
        names = ", ".join(f"`{metric.exposed}`" for metric in metrics)
        yield f"- {names}: {', '.join(f'{bound:g}' for bound in bounds)}"
