"""The figures as rows of text: the same in the page and on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.bench.cost import cost_of
from pdserve.bench.records import RequestRecord, Summary, Trial, summarise
from pdserve.bench.search import Goodput
from pdserve.bench.suite import Run, SystemResult

_LAG_LIMIT_S = 0.02
"""A client that sends later than this (p99) is too slow for the load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables_of(run: Run) -> list[Table]:
    return [
        table
        for table in (
            goodput_table(run),
            latency_table(run),
            class_table(run),
            trial_table(run),
            error_table(run),
        )
        if table.rows
    ]


def goodput_table(run: Run) -> Table:
    # Without a price there is nothing to say in the last two columns.
    priced = any(system.price_per_unit_hour is not None for system in run.systems)
    head = ["system", "inside", "requests/s", "95% interval", "per unit", "per 1M tokens"]
    head += ["price per 1M", "requests per price"] if priced else []
    rows = []
    for system in run.systems:
        if system.failed:
            rows.append([system.name, "failed", *[""] * (len(head) - 2)])
        rows += [_goodput_row(run, system, goodput, priced=priced) for goodput in system.goodputs]
    without = "" if priced else " Prices appear when the scenario gives price_per_unit_hour."
    return Table(
        title="Goodput: the highest rate with so many requests inside their targets",
        head=head,
        rows=rows,
        note=(
            "The interval comes from resampling the trials; an open end lies beyond the rates tried. "
            f"Tokens are output tokens.{without}"
        ),
    )


def _goodput_row(run: Run, system: SystemResult, goodput: Goodput, *, priced: bool) -> list[str]:
    cost = cost_of(run, system, goodput)
    row = [
        system.name,
        f"{goodput.attainment:.0%}",
        rate_text(goodput, system),
        interval_text(goodput),
        _per_unit(cost.requests_per_s_per_unit if cost else None, system),
        _figure(cost.unit_hours_per_million_tokens if cost else None, f" {system.unit}-h"),
    ]
    if priced:
        row += [
            _figure(cost.price_per_million_tokens if cost else None),
            _figure(cost.requests_per_price if cost else None),
        ]
    return row


def latency_table(run: Run) -> Table:
    trials = run.common_trials()
    rows = []
    for system in run.systems:
        mine = [trial for trial in trials if trial.system == system.name]
        if not mine:
            continue
        summary = _together(mine)
        for name, figures in (
            ("TTFT", summary.ttft_s),
            ("TPOT", summary.tpot_s),
            ("ITL", summary.itl_s),
            ("end to end", summary.e2e_s),
        ):
            values = [milliseconds(figures.get(key)) for key in ("mean", "p50", "p90", "p95", "p99", "max")]
            rows.append([system.name, name, *values])
    rate = f" at {trials[0].rate:.3g} requests/s" if trials else ""
    return Table(
        title=f"Latency{rate}",
        head=("system", "", "mean", "p50", "p90", "p95", "p99", "max"),
        rows=rows,
        note=(
            "From the moment a request was due, not from when it could be sent. Failed requests have no "
            "latency: see how many there are. Percentiles of few requests are coarse: p99 of 60 is nearly "
            "their maximum."
        ),
    )


def class_table(run: Run) -> Table:
    if len(run.scenario.classes) < 2:
        return Table(title="", head=(), rows=[])
    rows = []
    for system in run.systems:
        records = [r for t in run.common_trials() if t.system == system.name for r in t.counted]
        for one in run.scenario.classes:
            mine = [record for record in records if record.class_name == one.name]
            if mine:
                rows.append([system.name, one.name, one.targets.describe(), str(len(mine)), *_attained(mine)])
    return Table(
        title="Classes, at the rate of the table above",
        head=("system", "class", "targets", "requests", "inside", "missed"),
        rows=rows,
    )


def trial_table(run: Run) -> Table:
    rows = []
    for trial in run.trials:
        summary = summarise(trial.counted, trial.wall_s)
        if not summary.num_requests:
            continue
        lag_s = summary.send_lag_s.get("p99", 0.0)
        rows.append(
            [
                f"{trial.started_s:.0f}",
                trial.system,
                f"{trial.rate:.3g}",
                str(summary.num_requests),
                f"{summary.attainment:.1%}",
                f"{summary.goodput:.3g}",
                f"{summary.output_tokens_per_s:.0f}",
                milliseconds(summary.ttft_s.get("p99")),
                milliseconds(summary.tpot_s.get("p99")),
                _share(summary.cached_tokens, summary.prompt_tokens),
                milliseconds(lag_s) + (" !" if lag_s > _LAG_LIMIT_S else ""),
                str(trial.num_clipped),
            ]
        )
    return Table(
        title="Every trial, in the order they ran",
        head=(
            "at s", "system", "offered/s", "requests", "inside", "goodput/s", "output tok/s", "TTFT p99",
            "TPOT p99", "prompt cached", "send lag p99", "clipped",
        ),
        rows=rows,
        note="! marks trials in which this client sent late: there the client limits, not the server.",
    )  # fmt: skip


def error_table(run: Run) -> Table:
    rows = []
    for system in run.systems:
        failed = [r for trial in run.trials_of(system.name) for r in trial.counted if r.error]
        kinds = Counter(record.error for record in failed)
        for kind, count in kinds.most_common():
            example = next((r.error_text for r in failed if r.error == kind and r.error_text), "")
            rows.append([system.name, str(kind), str(count), example[:160]])
    return Table(
        title="Requests without a complete answer",
        head=("system", "kind", "requests", "an example"),
        rows=rows,
        note='"cut": not answered within drain_s of the last arrival. All of these miss their targets.',
    )


def rate_text(goodput: Goodput, system: SystemResult) -> str:
    if goodput.rate is not None:
        return f"{goodput.rate:.3g}"
    tried = [point.rate for point in system.points]
    if not tried:
        return "-"
    first = min(system.points, key=lambda point: point.rate)
    return f"below {min(tried):.3g}" if first.attainment < goodput.attainment else f"above {max(tried):.3g}"


def interval_text(goodput: Goodput) -> str:
    if goodput.low is None and goodput.high is None:
        return "-"
    low = "..." if goodput.low is None else f"{goodput.low:.3g}"
    return f"{low} - {'...' if goodput.high is None else f'{goodput.high:.3g}'}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _attained(records: Sequence[RequestRecord]) -> list[str]:
    misses = Counter(name for record in records for name in record.missed())
    inside = sum(record.met for record in records) / len(records)
    return [f"{inside:.1%}", ", ".join(f"{name} {count}" for name, count in misses.most_common()) or "-"]


def _together(trials: Sequence[Trial]) -> Summary:
    return summarise([r for t in trials for r in t.counted], sum(t.wall_s for t in trials))


def _per_unit(value: float | None, system: SystemResult) -> str:
    return "-" if value is None else f"{value:.3g}/{system.unit}"


def _figure(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
