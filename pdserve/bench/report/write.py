"""All files of a run, in its folder."""

from __future__ import annotations

from pathlib import Path

from pdserve.bench.report.charts import charts_of
from pdserve.bench.report.files import RESULTS, write_csv, write_json
from pdserve.bench.report.html import write_html
from pdserve.bench.report.png import is_available, write_pngs
from pdserve.bench.suite import Run


def write_report(run: Run, out: Path, *, png: bool = True) -> list[Path]:
    """Returns what was written: the page first. PNGs only where matplotlib is installed."""
    out.mkdir(parents=True, exist_ok=True)
    charts = charts_of(run)
    page, results, requests = out / "report.html", out / RESULTS, out / "requests.csv"
    write_json(run, results)
    write_csv(run, requests)
    write_html(run, page, charts=charts)
    pngs = write_pngs(charts, out / "png") if png and is_available() else []
    return [page, results, requests, *pngs]
