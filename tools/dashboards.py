"""Grafana's JSON from deploy/grafana/dashboards.yaml: `python tools/dashboards.py`. `make docs` runs it.

Panels are a few lines there, so that a review reads queries and not pages of layout. A test compares the
committed files with what this makes, and every name in a query with the catalogue of metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

FOLDER: Final = Path(__file__).parents[1] / "deploy" / "grafana"
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_VARIABLE_FROM: Final = "pdserve_worker_up"
"""The series that has every model and every worker."""
_COLUMNS, _WIDTH, _HEIGHT = 24, 8, 8


def files() -> dict[str, str]:
    """Name and content of every dashboard."""
    boards = yaml.safe_load((FOLDER / "dashboards.yaml").read_text())
    return {f"{board['uid']}.json": json.dumps(_dashboard(board), indent=1) + "\n" for board in boards}


def _dashboard(board: dict[str, Any]) -> dict[str, Any]:
    return {
        "uid": board["uid"],
        "title": board["title"],
        "tags": ["pdserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["pdserve"], "title": "pdserve", "asDropdown": True}],
        "templating": {"list": list(_variables(board["variable"]))},
        "panels": list(_panels(board["rows"])),
    }


def _variables(label: str) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    query = f"label_values({_VARIABLE_FROM}, {label})"
    yield {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for row in rows:
        number += 1
        place = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": row["title"], "gridPos": place}
        y, x = y + 1, 0
        for panel in row["panels"]:
            number += 1
            width = panel.get("width", _WIDTH)
            if x + width > _COLUMNS:
                x, y = 0, y + _HEIGHT
            yield {"id": number, "gridPos": {"h": _HEIGHT, "w": width, "x": x, "y": y}, **_panel(panel)}
            x += width
        y += _HEIGHT


def _panel(panel: dict[str, Any]) -> dict[str, Any]:
    kind = panel.get("kind", "timeseries")
    defaults: dict[str, Any] = {"unit": panel["unit"], "min": 0}
    made: dict[str, Any] = {
        "type": kind,
        "title": panel["title"],
        "description": panel.get("about", ""),
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [_target(index, query, kind) for index, query in enumerate(panel["queries"])],
    }
    if kind == "timeseries":
        stacked = panel.get("stacked", False)
        style: dict[str, Any] = {"fillOpacity": 30 if stacked else 5, "showPoints": "never"}
        defaults["custom"] = style | ({"stacking": {"mode": "normal"}} if stacked else {})
        made["options"] = {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"displayMode": "list"}}
    return made


def _target(index: int, query: dict[str, str], kind: str) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + index),
        "datasource": _SOURCE,
        "expr": query["expr"],
        "legendFormat": query["legend"],
        "format": "heatmap" if kind == "heatmap" else "time_series",
    }


def main() -> None:
    for name, text in files().items():
        (FOLDER / "dashboards" / name).write_text(text)


if __name__ == "__main__":
    main()
