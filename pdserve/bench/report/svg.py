"""Charts as inline SVG: no library, no network. Points carry their values for the page's tooltip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from pdserve.bench.report.charts import Chart, HeatMap, Line, LineChart

WIDTH: Final = 560
HEIGHT: Final = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 56, 46
_LEGEND_ROW: Final = 13
"""Between two rows of names, which have the space between title and plot."""
_TIPS_PER_LINE: Final = 40


def draw(chart: Chart) -> str:
    body = _heat_map(chart) if isinstance(chart, HeatMap) else _line_chart(chart)
    return (
        f'<svg class="chart" id="{escape(chart.key)}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title)}" xmlns="http://www.w3.org/2000/svg">'
        f'<text class="title" x="{_LEFT}" y="18">{escape(chart.title)}</text>{body}</svg>'
    )


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        part = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _line_chart(chart: LineChart) -> str:
    layers = _stacked(chart.lines) if chart.stacked else [(line, list(line.y)) for line in chart.lines]
    xs = [x for line in chart.lines for x in line.x if x > 0 or not chart.log_x]
    xs += [x for x, _ in chart.x_marks]
    ys = [y for _, values in layers for y in values] + [y for line in chart.lines for y in line.high]
    if not xs or not ys:
        return f'<text class="empty" x="{WIDTH / 2}" y="{HEIGHT / 2}">no data</text>'
    low_x, high_x = min(xs), max(xs)
    if chart.log_x:
        low_x, high_x = low_x / 1.1, high_x * 1.1
    x = _Scale(low_x, high_x, _LEFT, WIDTH - _RIGHT, chart.log_x)
    y = _Scale(0.0, chart.y_max or max(max(ys) * 1.08, 1e-9), HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(x, y, chart.x_label, chart.y_label), _marks(chart, x, y)]
    floor = [0.0] * len(layers[0][1])
    for line, values in layers:
        parts.append(_area(line, floor, values, x, y) if chart.stacked else _curve(line, x, y))
        floor = values
    parts += [_tips(line, values, x, y, chart) for line, values in layers]
    parts.append(_legend(chart.lines))
    return "".join(parts)


def _stacked(lines: Sequence[Line]) -> list[tuple[Line, list[float]]]:
    layers: list[tuple[Line, list[float]]] = []
    top = [0.0] * (len(lines[0].x) if lines else 0)
    for line in lines:
        top = [below + value for below, value in zip(top, line.y, strict=True)]
        layers.append((line, top))
    return layers


def _curve(line: Line, x: _Scale, y: _Scale) -> str:
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, line.y, strict=True))
    drawn = f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"/>'
    for a, low, high in zip(line.x, line.low, line.high, strict=False):
        drawn += (
            f'<line x1="{x(a):.1f}" x2="{x(a):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" '
            f'stroke="{line.colour}" stroke-opacity=".45" stroke-width="3"/>'
        )
    return drawn


def _area(line: Line, floor: Sequence[float], top: Sequence[float], x: _Scale, y: _Scale) -> str:
    upper = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, top, strict=True)]
    lower = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(line.x, floor, strict=True)]
    return (
        f'<polygon points="{" ".join([*upper, *reversed(lower)])}" fill="{line.colour}" fill-opacity=".8"/>'
    )


def _tips(line: Line, tops: Sequence[float], x: _Scale, y: _Scale, chart: LineChart) -> str:
    step = max(1, len(line.x) // _TIPS_PER_LINE)
    radius = 3.5 if line.markers else 5
    shown = "" if line.markers else ' fill-opacity="0"'
    circles = []
    for index in range(0, len(line.x), step):
        text = (
            f"{line.name}: {number(line.y[index])} {chart.y_label}, {number(line.x[index])} {chart.x_label}"
        )
        circles.append(
            f'<circle cx="{x(line.x[index]):.1f}" cy="{y(tops[index]):.1f}" r="{radius}" fill="{line.colour}"'
            f'{shown} data-tip="{escape(text)}"/>'
        )
    return "".join(circles)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> str:
    parts = []
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 15}">{number(value)}</text>')
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{at + 4:.1f}">{number(value)}</text>')
    return "".join(parts) + _labels(x_label, y_label)


def _marks(chart: LineChart, x: _Scale, y: _Scale) -> str:
    parts = []
    for value, name in chart.x_marks:
        at = x(value)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="tick end" x="{at - 4:.1f}" y="{_TOP + 12}">{escape(name)}</text>')
    for value, name in chart.y_marks:
        at = y(value)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick start" x="{_LEFT + 4}" y="{at + 11:.1f}">{escape(name)}</text>')
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    parts, left, base = [], float(_LEFT), 34
    for line in lines:
        width = 24 + 6.6 * len(line.name)
        if left > _LEFT and left + width > WIDTH:
            left, base = float(_LEFT), base + _LEGEND_ROW
        parts.append(f'<rect x="{left:.1f}" y="{base - 8}" width="10" height="8" fill="{line.colour}"/>')
        parts.append(f'<text class="legend" x="{left + 14:.1f}" y="{base}">{escape(line.name)}</text>')
        left += width
    return "".join(parts)


def _heat_map(chart: HeatMap) -> str:
    known = [value for row in chart.cells for value in row if value is not None]
    peak = max(known, default=1.0) or 1.0
    width = (WIDTH - _LEFT - _RIGHT) / len(chart.columns)
    height = (HEIGHT - _TOP - _BOTTOM) / len(chart.rows)
    parts = []
    for j, row in enumerate(chart.cells):
        for i, value in enumerate(row):
            left, top = _LEFT + i * width, _TOP + j * height
            shade = 0.0 if value is None else 0.12 + 0.78 * value / peak
            text = "-" if value is None else number(value)
            tip = f"{chart.columns[i]} prefill, {chart.rows[j]} decode: {text} {chart.unit}"
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" '
                f'fill="#2563eb" fill-opacity="{shade:.2f}" stroke="#cbd5e1" data-tip="{escape(tip)}"/>'
                f'<text class="cell" x="{left + width / 2:.1f}" y="{top + height / 2 + 5:.1f}">{text}</text>'
            )
    for i, name in enumerate(chart.columns):
        at = _LEFT + (i + 0.5) * width
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 15}">{escape(name)}</text>')
    for j, name in enumerate(chart.rows):
        at = _TOP + (j + 0.5) * height + 4
        parts.append(f'<text class="tick end" x="{_LEFT - 8}" y="{at:.1f}">{escape(name)}</text>')
    return "".join(parts) + _labels(chart.x_label, chart.y_label)


def _labels(x_label: str, y_label: str) -> str:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return (
        f'<text class="label" x="{(_LEFT + WIDTH) / 2}" y="{HEIGHT - 10}">{escape(x_label)}</text>'
        f'<text class="label" x="14" y="{middle}" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )


def number(value: float) -> str:
    """Three digits; whole thousands as they are."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    raw = (high - low) / wanted if high > low else 1.0
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    spread = high / low
    factors = (
        (1.0,) if spread > 1000 else (1.0, 2.0, 5.0) if spread > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    )
    ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
    return ticks if len(ticks) > 1 else [low, math.sqrt(low * high), high]
