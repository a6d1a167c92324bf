"""Asks Prometheus for every panel's data: `python tools/check_dashboards.py http://127.0.0.1:9090`.

Prints the queries that return none, and exits with 1 if there are any. `optional` panels (a GPU's power,
speculative decoding) are asked for only to see that their queries are accepted.
"""

from __future__ import annotations

import json
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

_PANELS: Final = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards.yaml"


def queries() -> Iterator[tuple[str, str, bool]]:
    """(where, PromQL as Grafana would send it, optional)."""
    for board in yaml.safe_load(_PANELS.read_text()):
        for row in board["rows"]:
            for panel in row["panels"]:
                for query in panel["queries"]:
                    where = f"{board['uid']}: {panel['title']} ({query['legend']})"
                    yield where, as_sent(query["expr"]), panel.get("optional", False)


def as_sent(expr: str) -> str:
    """With Grafana's variables filled in: all models, all workers, an interval of a minute."""
    for variable, value in (("$__rate_interval", "1m"), ("$model", ".*"), ("$worker", ".*")):
        expr = expr.replace(variable, value)
    return expr


def ask(prometheus: str, expr: str) -> list[Any]:
    """Samples of an instant query. Raises OSError where Prometheus does not answer or accept it."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    with urllib.request.urlopen(url, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    samples: list[Any] = answer["data"]["result"]
    return samples


def without_data(prometheus: str) -> list[str]:
    """Panels whose queries return nothing, or only values that are no numbers."""
    found = []
    for where, expr, optional in queries():
        samples = ask(prometheus, expr)
        if not optional and all(sample["value"][1] == "NaN" for sample in samples):
            found.append(f"{where}: {expr}")
    return found


def main() -> None:
    missing = without_data(sys.argv[1].rstrip("/"))
    print("\n".join(missing) or "every panel has data")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
