"""Tables and charts of `benchmarks.policies`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.policy_cases import CASES, MAIN, SWEEP, Case, Kind, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COMPARED: Final = (Kind.TUNED, Kind.UNTUNED, Kind.PLAIN, Kind.NAMED, Kind.STATIC)
_SHORT: Final = {
    Kind.TUNED: "colocated, tuned",
    Kind.UNTUNED: "colocated, 2048",
    Kind.PLAIN: "colocated, 2048, nothing refused",
    Kind.NAMED: "best named policy",
    Kind.STATIC: "fixed split",
}


def best(rows: Iterable[Row]) -> Row | None:
    """At the rate, and with the split or the step size, that gave most goodput."""
    return max(rows, key=lambda row: row.goodput, default=None)


def best_of(rows: Sequence[Row], case: Case, kind: Kind) -> Row | None:
    return best(row for row in rows if row.case == case.name and row.kind is kind)


def ratio(one: Row | None, other: Row | None) -> float | None:
    return one.goodput / other.goodput if one is not None and other is not None and other.goodput else None


def summary(rows: Sequence[Row]) -> str:
    """One line per case: our goodput, and its ratio to each of the others."""
    lines = [
        "| | goodput/s | attainment | " + " | ".join(f"x {_SHORT[kind]}" for kind in _COMPARED) + " |",
        "|---|---|---|" + "---|" * len(_COMPARED),
    ]
    for case in CASES:
        ours = best_of(rows, case, Kind.OURS)
        if ours is None:
            continue
        cells = []
        for kind in _COMPARED:
            theirs = best_of(rows, case, kind)
            found = ratio(ours, theirs)
            none = "not run" if theirs is None else "they serve none in time"
            cells.append(none if found is None else f"{found:.2f}")
        lines.append(
            f"| {case.name} | {ours.goodput:.1f} ({ours.name.removeprefix('sla, ')}) "
            f"| {ours.attainment:.1%} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def table(case: Case, rows: Sequence[Row]) -> str:
    """Every set-up of a case, each at the rate that gave most goodput."""
    lines = [
        f"### {case.name}\n",
        "| | goodput/s | at | attainment | refused | TTFT p99 | TPOT p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    mine = [row for row in rows if row.case == case.name]
    for name in dict.fromkeys(row.name for row in mine):
        row = best(row for row in mine if row.name == name)
        assert row is not None
        lines.append(
            f"| {name} | {row.goodput:.1f} | {row.rate:g}/s | {row.attainment:.1%} | {row.refused:.0%} "
            f"| {row.ttft_p99_ms:.0f} ms | {row.tpot_p99_ms:.1f} ms |"
        )
    return "\n".join(lines) + "\n"


# --- charts -------------------------------------------------------------------------------------------


def charts(rows: Sequence[Row], folder: Path) -> None:
    _chart(folder / "goodput-by-rate.png", lambda axes: _by_rate(axes, rows))
    _chart(folder / "goodput-by-tpot.png", lambda axes: _by_tpot(axes, rows))
    _chart(folder / "overload.png", lambda axes: _overload(axes, rows))


def _chart(path: Path, draw: Callable[[Axes], None]) -> None:
    # Not pyplot: it may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _by_rate(axes: Axes, rows: Sequence[Row]) -> None:
    mine = [row for row in rows if row.case == MAIN.name]
    for kind in (Kind.OURS, *_COMPARED):
        top = best_of(rows, MAIN, kind)
        if top is not None:
            line = sorted((row.rate, row.goodput) for row in mine if row.name == top.name)
            axes.plot(*zip(*line, strict=True), marker="o", label=top.name)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("requests per second that met both targets")
    axes.set_title(f"{MAIN.name}, {MAIN.workers} H100 workers, modelled", fontsize=10)


def _by_tpot(axes: Axes, rows: Sequence[Row]) -> None:
    cases = sorted((MAIN, *SWEEP), key=lambda case: case.tpot_s)
    for kind in (Kind.TUNED, Kind.UNTUNED, Kind.PLAIN):
        points = [
            (case.tpot_s * 1e3, found)
            for case in cases
            if (found := ratio(best_of(rows, case, Kind.OURS), best_of(rows, case, kind))) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"against {kind.value}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(2.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("TPOT target, ms")
    axes.set_ylabel("our goodput / theirs")
    axes.set_title("Mixed trace, 8B, TTFT target 500 ms, modelled", fontsize=10)


def _overload(axes: Axes, rows: Sequence[Row]) -> None:
    """Each as a part of its own peak, over the rate as a multiple of it."""
    mine = [row for row in rows if row.case == MAIN.name]
    for kind in (Kind.OURS, Kind.TUNED, Kind.PLAIN, Kind.NAMED):
        top = best_of(rows, MAIN, kind)
        if top is not None and top.goodput:
            line = sorted((r.rate / top.goodput, r.goodput / top.goodput) for r in mine if r.name == top.name)
            axes.plot(*zip(*line, strict=True), marker="o", label=top.name)
    axes.set_xlabel("arrivals / peak goodput")
    axes.set_ylabel("goodput / peak goodput")
    axes.set_title(f"Overload: {MAIN.name}", fontsize=10)
