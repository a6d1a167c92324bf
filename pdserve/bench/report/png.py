"""The same charts as PNG files, for slides and documents. Needs matplotlib: `pip install pdserve[bench]`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pdserve.bench.report.charts import Chart, HeatMap, LineChart


def is_available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_pngs(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """One file per chart, named by its key."""
    # Not pyplot: it keeps figures for ever and may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        if isinstance(chart, HeatMap):
            _heat_map(axes, chart)
        else:
            _lines(axes, chart)
        path = folder / f"{_file_name(chart.key)}.png"
        figure.savefig(path)
        written.append(path)
    return written


def _lines(axes, chart: LineChart) -> None:  # type: ignore[no-untyped-def]  # matplotlib is optional
    if chart.stacked and chart.lines:
        axes.stackplot(
            chart.lines[0].x,
            *(line.y for line in chart.lines),
            labels=[line.name for line in chart.lines],
            colors=[line.colour for line in chart.lines],
        )
    else:
        for line in chart.lines:
            marker = "o" if line.markers else None
            axes.plot(line.x, line.y, color=line.colour, label=line.name, marker=marker, markersize=4)
            if line.low:
                axes.vlines(line.x, line.low, line.high, color=line.colour, alpha=0.4, linewidth=3)
    if chart.log_x and any(line.x for line in chart.lines):
        axes.set_xscale("log")
    axes.set_ylim(bottom=0, top=chart.y_max)
    for value, _ in chart.x_marks:
        axes.axvline(value, color="#64748b", linestyle="--", linewidth=1)
    for value, _ in chart.y_marks:
        axes.axhline(value, color="#64748b", linestyle="--", linewidth=1)
    axes.grid(alpha=0.3)
    if chart.lines:
        axes.legend(fontsize=8)


def _heat_map(axes, chart: HeatMap) -> None:  # type: ignore[no-untyped-def]  # matplotlib is optional
    values = [[float("nan") if value is None else value for value in row] for row in chart.cells]
    axes.imshow(values, cmap="Blues", aspect="auto", vmin=0)
    axes.set_xticks(range(len(chart.columns)), chart.columns)
    axes.set_yticks(range(len(chart.rows)), chart.rows)
    for j, row in enumerate(chart.cells):
        for i, value in enumerate(row):
            axes.text(i, j, "-" if value is None else f"{value:.3g}", ha="center", va="center")


def _file_name(key: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in key)
