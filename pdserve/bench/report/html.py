"""One page that needs nothing else: styles, charts and a few lines of script are inside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from pdserve.bench.report.charts import Chart, charts_of
from pdserve.bench.report.svg import draw
from pdserve.bench.report.tables import Table, goodput_table, tables_of
from pdserve.bench.suite import Run

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#0f172a;--dim:#64748b;--line:#e2e8f0;--page:#f8fafc;--card:#fff}
@media (prefers-color-scheme:dark){
:root{--ink:#e2e8f0;--dim:#94a3b8;--line:#334155;--page:#0b1220;--card:#111a2e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0}
main{max-width:1200px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0}h2{font-size:17px;margin:28px 0 8px}
.lead{font-size:17px}.dim,.note{color:var(--dim)}.note{font-size:13px;margin:6px 0 0}
.grid-of{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:16px}
.chart,.table{background:var(--card);border:1px solid var(--line);border-radius:8px}
.chart{width:100%;height:auto}.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 12px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:600;font-size:13px}tr:last-child td{border-bottom:0}
code{font-size:13px;overflow-wrap:anywhere}
svg text{fill:var(--ink);font-family:system-ui,sans-serif;font-size:11px}
svg .title{font-size:13px;font-weight:600}svg .tick{fill:var(--dim);text-anchor:middle}
svg .tick.end{text-anchor:end}svg .tick.start{text-anchor:start}svg .label{fill:var(--dim);text-anchor:middle}
svg .cell{font-size:15px;text-anchor:middle}svg .empty{text-anchor:middle;fill:var(--dim)}
.grid{stroke:var(--line)}.mark{stroke:var(--dim);stroke-dasharray:4 3}
#tip{position:fixed;display:none;background:#0f172a;color:#fff;padding:4px 8px;border-radius:4px;
font-size:12px;pointer-events:none;max-width:320px}
"""
_SCRIPT: Final = """
const tip=document.getElementById('tip');
document.addEventListener('mousemove',e=>{
  const text=e.target.dataset&&e.target.dataset.tip;
  tip.style.display=text?'block':'none';
  if(text){tip.textContent=text;
    tip.style.left=Math.min(e.clientX+12,innerWidth-330)+'px';tip.style.top=(e.clientY+14)+'px';}
});
"""


def write_html(run: Run, path: Path, *, charts: Sequence[Chart] | None = None) -> None:
    path.write_text(render(run, charts or charts_of(run)), encoding="utf-8")


def render(run: Run, charts: Sequence[Chart]) -> str:
    first, *rest = tables_of(run) or [goodput_table(run)]
    body = [
        f"<h1>{escape(run.scenario.name)}: how much load meets the targets</h1>",
        f'<p class="dim">{escape(_subtitle(run))}</p>',
        f'<p class="lead">{escape(" ".join(headlines(run)))}</p>',
        _table(first),
        '<h2>Plots</h2><div class="grid-of">',
        *(draw(chart) for chart in charts),
        "</div>",
        *(_table(table) for table in rest),
        _conditions(run),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run.scenario.name)} - pdserve bench</title><style>{_STYLE}</style></head>"
        f'<body><main>{"".join(body)}</main><div id="tip"></div><script>{_SCRIPT}</script></body></html>\n'
    )


def headlines(run: Run) -> list[str]:
    """One sentence per system: what it can carry."""
    goal, said = run.scenario.search.goal, []
    for system in run.systems:
        found = next((g for g in system.goodputs if g.attainment == goal), None)
        if system.failed:
            said.append(f"{system.name} failed: {system.failed}.")
        elif found is None or not system.points:
            said.append(f"{system.name} was not measured.")
        elif found.rate is not None:
            said.append(f"{system.name} keeps {goal:.0%} of requests inside at {found.rate:.3g} per second.")
        elif min(system.points, key=lambda p: p.rate).attainment < goal:
            lowest = min(point.rate for point in system.points)
            said.append(f"{system.name} misses {goal:.0%} even at {lowest:.3g} requests per second.")
        else:
            highest = max(point.rate for point in system.points)
            said.append(f"{system.name} keeps {goal:.0%} inside up to the {highest:.3g} per second tried.")
    return said


def _subtitle(run: Run) -> str:
    targets = "; ".join(f"{one.name}: {one.targets.describe()}" for one in run.scenario.classes)
    return f"{run.environment.started}, {run.wall_s / 60:.1f} minutes. Targets: {targets}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f"<h2>{escape(table.title)}</h2>"
        f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
    )


def _conditions(run: Run) -> str:
    machine = run.environment
    rows = [
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB, {machine.platform}"),
        ("load before", f"{machine.load_before:g} (near 0 on a quiet machine)"),
        ("pdserve", f"{machine.pdserve} {machine.commit}, Python {machine.python}"),
        ("seed", str(run.scenario.seed)),
        ("trial", f"{run.scenario.warmup_s:g} s warm-up + {run.scenario.duration_s:g} s arrivals"),
        *((system.name, shlex.join(system.command) or system.address) for system in run.systems),
    ]
    cells = "".join(f"<tr><td>{escape(k)}</td><td><code>{escape(v)}</code></td></tr>" for k, v in rows)
    scenario = run.scenario.model_dump_json(indent=1, exclude={"systems": {"__all__": {"api_key"}}})
    return (
        f'<h2>Conditions</h2><div class="table"><table><tbody>{cells}</tbody></table></div>'
        f"<details><summary>The scenario</summary><pre><code>{escape(scenario)}</code></pre></details>"
    )
