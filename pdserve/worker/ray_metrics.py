"""A worker's state in Ray's own metrics, and in the name of its process, which Ray's dashboard shows.

A thread of its own reads the last published heartbeat: nothing here is on the way of a step or a token.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from pdserve.core import metric_catalog as catalog
from pdserve.core.messages import Heartbeat, Role
from pdserve.core.metric_catalog import Kind, Metric
from pdserve.worker.spec import WorkerSpec

_EVERY_S: Final = 0.2
"""How often the process is named: Ray gives it another name at every call."""
_TELL_EVERY: Final = 5
"""Times of that between two updates of the metrics, which Ray collects every ten seconds."""
_BLOCK_STATES: Final = ("free", "held", "cached", "quarantined")


class Instrument(Protocol):
    """What is used of `ray.util.metrics.Counter` (`inc`) and `Gauge` (`set`)."""

    def __call__(self, value: float, tags: dict[str, str]) -> None: ...


class RayMetrics:
    """`update` with each heartbeat, from one thread."""

    def __init__(self, worker: str, role: Role, model: str, make: Callable[[Metric], Instrument]) -> None:
        self._role = role
        self._tags = {"worker": worker, "role": role.value, "model": model}
        self._make = make
        self._instruments: dict[str, Instrument] = {}
        self._counted: dict[str, float] = {}

    def update(self, beat: Heartbeat) -> None:
        self._tags["role"] = (beat.role or self._role).value
        self._set(catalog.RAY_RUNNING, beat.running)
        self._set(catalog.RAY_WAITING, beat.waiting)
        self._set(catalog.RAY_STEP, beat.step_s)
        for state in _BLOCK_STATES:
            self._set(catalog.RAY_BLOCKS, getattr(beat.blocks, state), state=state)
        self._count(catalog.RAY_BUSY, beat.busy_s)
        self._count(catalog.RAY_TOKENS, beat.tokens_computed)
        if beat.device is not None:
            self._set(catalog.RAY_UTILISATION, beat.device.utilisation)
            self._set(catalog.RAY_MEMORY, beat.device.memory_used_bytes)

    def _set(self, metric: Metric, value: float, **more: str) -> None:
        self._instrument(metric)(value, {**self._tags, **more})

    def _count(self, metric: Metric, total: float) -> None:
        grown = total - self._counted.get(metric.name, 0.0)
        if grown > 0:
            self._counted[metric.name] = total
            self._instrument(metric)(grown, dict(self._tags))

    def _instrument(self, metric: Metric) -> Instrument:
        instrument = self._instruments.get(metric.name)
        if instrument is None:
            instrument = self._instruments[metric.name] = self._make(metric)
        return instrument


def ray_instrument(metric: Metric) -> Instrument:
    """Of this process's Ray; Ray puts `ray_` before the name and `_total` after a counter's."""
    from ray.util import metrics  # here: workers in tests run without Ray

    if metric.kind is Kind.COUNTER:
        counter = metrics.Counter(metric.full_name, metric.help, metric.labels)
        return lambda value, tags: counter.inc(value, tags)
    gauge = metrics.Gauge(metric.full_name, metric.help, metric.labels)
    return lambda value, tags: gauge.set(value, tags)


class Status:
    """What a worker does, in a few words: `busy 44%, 3 running, 2 queued`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at, self._busy_s = clock(), 0.0

    def __call__(self, beat: Heartbeat) -> str:
        """Busy since the last call."""
        now = self._clock()
        elapsed_s, busy_s = now - self._at, beat.busy_s - self._busy_s
        self._at, self._busy_s = now, beat.busy_s
        busy = min(busy_s / elapsed_s, 1.0) if elapsed_s > 0 else 0.0
        state = "draining, " if beat.draining else ""
        return f"{state}busy {busy:.0%}, {beat.running} running, {beat.waiting} queued"


class Exporter:
    """Tells every second, and names the process in between, on a daemon thread, until `stop`."""

    def __init__(
        self,
        read: Callable[[], Heartbeat | None],
        tell: Callable[[Heartbeat], None],
        rename: Callable[[str], None],
    ) -> None:
        """rename: given what the worker does, in a few words."""
        self.status = "idle"
        self._read, self._tell, self._rename, self._describe = read, tell, rename, Status()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        for count in itertools.count():
            if self._stopping.wait(_EVERY_S):
                return
            beat = self._read() if count % _TELL_EVERY == 0 else None
            if beat is not None:
                self.status = self._describe(beat)
                self._tell(beat)
            self._rename(self.status)


def export_to_ray(spec: WorkerSpec, read: Callable[[], Heartbeat | None]) -> Exporter | None:
    """None in a process that is no Ray worker, as in tests."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    metrics = RayMetrics(spec.worker, spec.role, spec.model_name, ray_instrument)
    # Not a public name: without it the process keeps the name that Ray gave it.
    name_process = getattr(ray._raylet, "setproctitle", lambda _: None)
    return Exporter(read, metrics.update, lambda status: name_process(f"ray::{spec.worker} ({status})"))
