"""Histograms with one writer: no lock, so that an observation is a `bisect` and two additions.

The event loop writes, a scrape reads on another thread: a page may miss the observation under way, no more.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pdserve.core.metric_catalog import Metric as CatalogMetric


class FastHistogram:
    """Counts of one set of labels."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` observations of the same value."""
        self.counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count


class FastHistograms(Collector):
    """One per set of labels, of a metric of the catalogue."""

    def __init__(self, metric: CatalogMetric, registry: CollectorRegistry) -> None:
        self._metric = metric
        self._children: Mapping[tuple[str, ...], FastHistogram] = {}
        registry.register(self)

    def labels(self, *values: str) -> FastHistogram:
        """In the catalogue's order."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._metric.labels):
                raise ValueError(f"{self._metric.name}: labels are {self._metric.labels}, got {values}")
            child = FastHistogram(self._metric.buckets)
            # A new mapping: a scrape may be going through the old one.
            self._children = {**self._children, values: child}
        return child

    def describe(self) -> Iterator[Metric]:
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        bounds = [*map(floatToGoString, self._metric.buckets), "+Inf"]
        for values, child in self._children.items():
            buckets = list(zip(bounds, itertools.accumulate(child.counts), strict=True))
            family.add_metric(values, buckets=buckets, sum_value=child.sum)
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(
            self._metric.full_name, self._metric.help, labels=list(self._metric.labels)
        )
