"""Which plots a run gets, as data: `svg` and `png` draw them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.bench.cost import cost_by_rate, hourly_price
from pdserve.bench.records import RequestRecord, Trial
from pdserve.bench.search import at_least
from pdserve.bench.suite import Run

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
PHASES = ("waiting", "prefill", "transfer", "decode")
PHASE_COLOURS = ("#94a3b8", "#2563eb", "#d97706", "#059669")
_CDF_POINTS = 200
_TIMELINE_POINTS = 160


Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    low: Sequence[float] = ()
    """With `high`: an interval around every point."""
    high: Sequence[float] = ()
    markers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """`stacked`: lines are layers from the bottom up, with the same x."""

    key: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    stacked: bool = False
    y_max: float | None = None
    x_marks: Sequence[tuple[float, str]] = ()
    """Vertical lines: targets."""
    y_marks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    key: str
    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    x_label: str
    y_label: str
    unit: str


Chart = LineChart | HeatMap


def charts_of(run: Run) -> list[Chart]:
    charts: list[Chart] = [_attainment(run), _goodput(run)]
    charts += _distributions(run)
    charts += [_timeline(trial) for trial in run.common_trials() if trial.counted]
    return charts + [chart for chart in (_transfers(run), _cost(run), _ratios(run)) if chart is not None]


def colour_of(run: Run, system: str) -> str:
    names = [result.name for result in run.systems]
    return COLOURS[names.index(system) % len(COLOURS)]


def _attainment(run: Run) -> LineChart:
    lines = []
    for system in run.systems:
        points = system.points
        intervals = [point.interval() for point in points]
        lines.append(
            Line(
                name=system.name,
                x=[p.rate for p in points],
                y=[100 * p.attainment for p in points],
                low=[100 * low for low, _ in intervals],
                high=[100 * high for _, high in intervals],
                colour=colour_of(run, system.name),
                markers=True,
            )
        )
    goal = run.scenario.search.goal
    goals = sorted({*run.scenario.search.attainment, goal})
    return LineChart(
        key="attainment",
        title="Requests inside their targets, by offered rate",
        x_label="offered requests per second",
        y_label="% inside targets (95% interval)",
        lines=lines,
        log_x=True,
        y_max=100.0,
        y_marks=[(100 * part, f"{part:.0%}" if part == goal else "") for part in goals],
    )


def _goodput(run: Run) -> LineChart:
    lines = [
        Line(
            name=system.name,
            x=[p.rate for p in system.points],
            y=[p.rate * p.attainment for p in system.points],
            colour=colour_of(run, system.name),
            markers=True,
        )
        for system in run.systems
    ]
    return LineChart(
        key="goodput",
        title="Goodput, by offered rate",
        x_label="offered requests per second",
        y_label="requests/s inside targets",
        lines=lines,
        log_x=True,
    )


def _cost(run: Run) -> LineChart | None:
    lines = [
        Line(
            name=system.name,
            x=[rate for rate, _ in costs],
            y=[cost for _, cost in costs],
            colour=colour_of(run, system.name),
            markers=True,
        )
        for system in run.systems
        if (costs := cost_by_rate(run, system))
    ]
    if not lines:
        return None
    priced = all(hourly_price(system) is not None for system in run.systems)
    unit = "price" if priced else f"{run.systems[0].unit}-hours"
    return LineChart(
        key="cost",
        title="Cost of a million output tokens inside their targets, by offered rate",
        x_label="offered requests per second",
        y_label=f"{unit} per 1M tokens",
        lines=lines,
        log_x=True,
    )


def _distributions(run: Run) -> list[LineChart]:
    def ttft(record: RequestRecord) -> list[float]:
        return [] if record.ttft_s is None else [record.ttft_s]

    def tpot(record: RequestRecord) -> list[float]:
        return [] if record.tpot_s is None else [record.tpot_s]

    def itl(record: RequestRecord) -> list[float]:
        return record.itl_s

    def e2e(record: RequestRecord) -> list[float]:
        return [] if record.e2e_s is None else [record.e2e_s]

    wanted = (("ttft", "TTFT", ttft), ("tpot", "TPOT", tpot), ("itl", "ITL", itl), ("e2e", "End to end", e2e))
    return [_cdf(run, key, name, values) for key, name, values in wanted]


def _cdf(run: Run, key: str, name: str, values_of: Callable[[RequestRecord], list[float]]) -> LineChart:
    trials = run.common_trials()
    lines = []
    for system in run.systems:
        records = [r for trial in trials if trial.system == system.name for r in trial.counted]
        values = np.sort([value * 1e3 for record in records for value in values_of(record)])
        if len(values) == 0:
            continue
        # Of many values a few tiny ones (two messages at once) would stretch the axis.
        first = 0.005 if len(values) > _CDF_POINTS else 0.0
        parts = np.linspace(first, 1, min(len(values), _CDF_POINTS)) if len(values) > 1 else np.array([1.0])
        lines.append(
            Line(
                name=system.name,
                x=[float(x) for x in np.quantile(values, parts)],
                y=[100 * float(part) for part in parts],
                colour=colour_of(run, system.name),
            )
        )
    rate = f" at {trials[0].rate:.3g} requests/s" if trials else ""
    return LineChart(
        key=key,
        title=f"{name}{rate}",
        x_label="milliseconds",
        y_label="% of them within",
        lines=lines,
        log_x=True,
        y_max=100.0,
        x_marks=list(_limits(run, key)),
    )


def _limits(run: Run, key: str) -> Iterable[tuple[float, str]]:
    """The targets of this latency; none of them is shown when classes differ."""
    name = {"itl": "itl_p99_ms"}.get(key, f"{key}_ms")
    limits = {getattr(one.targets, name) for one in run.scenario.classes}
    limit = limits.pop() if len(limits) == 1 else None
    if limit is not None:
        yield float(limit), f"target {limit:g}"


def _timeline(trial: Trial) -> LineChart:
    """How many requests were in which phase, by what the server says of each."""
    end_s = max((r.done_s or r.intended_s for r in trial.records), default=1.0)
    at = np.linspace(0, end_s, _TIMELINE_POINTS)
    counts = {phase: np.zeros(len(at)) for phase in PHASES}
    for record in trial.records:
        for phase, since_s, until_s in phases_of(record, end_s):
            counts[phase] += (at >= since_s) & (at < until_s)
    used = [(p, c) for p, c in zip(PHASES, PHASE_COLOURS, strict=True) if counts[p].any()]
    return LineChart(
        key=f"timeline-{trial.system}",
        title=f"{trial.system} at {trial.rate:.3g} requests/s: where requests are",
        x_label="seconds",
        y_label="requests",
        lines=[
            Line(name=phase, x=list(map(float, at)), y=list(map(float, counts[phase])), colour=colour)
            for phase, colour in used
        ],
        stacked=True,
    )


def phases_of(record: RequestRecord, end_s: float) -> list[tuple[str, float, float]]:
    """(phase, from, until) on the trial's clock. Waiting begins when the request was due."""
    start_s, done_s = record.intended_s, record.done_s if record.done_s is not None else end_s
    first_s = record.token_times_s[0] if record.token_times_s else done_s
    timings = record.timings
    if timings is None:
        return [("waiting", start_s, first_s), ("decode", first_s, done_s)]
    # The first token is streamed when prefill ends; what travels after that is the exposed transfer.
    read_s = max(start_s, first_s - timings.prefill_s)
    arrived_s = min(done_s, first_s + timings.transfer_exposed_s)
    return [
        ("waiting", start_s, read_s),
        ("prefill", read_s, first_s),
        ("transfer", first_s, arrived_s),
        ("decode", arrived_s, done_s),
    ]


def _transfers(run: Run) -> LineChart | None:
    """KV between workers over the same trials, by what the server says each request moved."""
    lines = []
    for trial in run.common_trials():
        end_s = max((r.done_s or r.intended_s for r in trial.records), default=1.0)
        edges = np.linspace(0, end_s, max(2, round(end_s) + 1))
        bytes_at = np.zeros(len(edges) - 1)
        for record in trial.records:
            if record.timings is not None:
                bytes_at += record.timings.bytes_moved * _parts_within(_under_way(record, end_s), edges)
        if not bytes_at.any():
            continue
        lines.append(
            Line(
                name=trial.system,
                x=[float(x) for x in (edges[:-1] + edges[1:]) / 2],
                y=[float(y) for y in bytes_at / np.diff(edges) / 1e6],
                colour=colour_of(run, trial.system),
            )
        )
    if not lines:
        return None
    return LineChart(
        key="transfers",
        title=f"KV moved at {run.common_trials()[0].rate:.3g} requests/s",
        x_label="seconds",
        y_label="MB/s between workers",
        lines=lines,
    )


def _under_way(record: RequestRecord, end_s: float) -> tuple[float, float]:
    """Layers leave as they are computed: from the beginning of the prompt's reading to the last arrival."""
    spans = {phase: (since_s, until_s) for phase, since_s, until_s in phases_of(record, end_s)}
    return spans["prefill"][0], spans["transfer"][1]


def _parts_within(span: tuple[float, float], edges: Floats) -> Floats:
    """Which part of the span lies between each two edges; all of it where it begins, if it has no length."""
    since_s, until_s = span[0], max(span[1], span[0] + 1e-6)
    return np.diff(np.clip(edges, since_s, until_s)) / (until_s - since_s)


def _ratios(run: Run) -> HeatMap | None:
    """Goodput by prefill and decode workers, when several arrangements were started."""
    goal = run.scenario.search.goal
    found: dict[tuple[int, int], float | None] = {}
    open_ended = False
    for system in run.systems:
        if system.prefill is None or system.decode is None:
            continue
        reached = [g for g in system.goodputs if g.attainment == goal]
        rate = at_least(reached[0], system.points) if reached else None
        open_ended |= rate is not None and reached[0].rate is None
        place = system.prefill, system.decode
        # Two with other settings: the better one stands for the arrangement.
        found[place] = max(filter(None, (found.get(place), rate)), default=None)
    if len(found) < 2 or not any(found.values()):
        return None
    prefills = sorted({p for p, _ in found})
    decodes = sorted({d for _, d in found})
    return HeatMap(
        key="ratios",
        title=f"Requests/s with {goal:.0%} inside targets" + (", or more" if open_ended else ""),
        columns=[str(p) for p in prefills],
        rows=[str(d) for d in decodes],
        cells=[[found.get((p, d)) for p in prefills] for d in decodes],
        x_label="prefill workers (0: decode workers read prompts)",
        y_label="decode workers",
        unit="requests/s",
    )
