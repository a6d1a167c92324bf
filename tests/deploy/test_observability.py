"""Dashboards, rules and documentation speak of metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel
from grafana_foundation_sdk.models.prometheus import Dataquery as PrometheusQuery

from pdserve.core.metric_catalog import CATALOG, Metric, series_names
from tests.support.paths import REPO
from tests.support.tools import load_tool

PROMETHEUS = REPO / "deploy" / "prometheus"
DASHBOARDS = REPO / "deploy" / "grafana" / "dashboards"
RULE_FILES = ("recording-rules.yml", "alerting-rules.yml")
_NAME = re.compile(r"\b(?:ray_)?pdserve_[a-z0-9_]+")
_RECORDED = re.compile(r"\bpdserve:[a-z0-9_:]+")
_SELECTOR = re.compile(r"(\w+)\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"(?:by|on|group_left|group_right)\s*\(([^)]*)\)")


def rules() -> Iterator[dict[str, object]]:
    for name in RULE_FILES:
        for group in yaml.safe_load((PROMETHEUS / name).read_text())["groups"]:
            yield from group["rules"]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel and every rule."""
    for where, expr, _ in load_tool("check_dashboards").queries():
        yield where, expr
    for rule in rules():
        yield str(rule.get("alert") or rule.get("record")), str(rule["expr"])


def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed")
    return found


def test_every_name_in_a_query_is_a_metric_or_a_recorded_one() -> None:
    known, recorded = series_names(), {rule["record"] for rule in rules() if "record" in rule}
    for where, expr in expressions():
        names = set(_NAME.findall(expr))
        assert names or _RECORDED.search(expr) or "up{" in expr, where
        assert names <= known.keys(), f"{where}: {names - known.keys()}"
        assert set(_RECORDED.findall(expr)) <= recorded, where


def test_every_label_in_a_query_is_one_that_its_metrics_have() -> None:
    known = series_names()
    for where, expr in expressions():
        for name, selector in _SELECTOR.findall(expr):
            if name in known:
                labels = set(_LABEL.findall(selector)) - {"le"}
                assert labels <= set(known[name].labels), f"{where}: {name} has no {labels}"
        used = {label for name in _NAME.findall(expr) for label in known[name].labels} | {"le"}
        for grouping in _GROUPING.findall(expr):
            labels = {label.strip() for label in grouping.split(",") if label.strip()}
            assert not _NAME.search(expr) or labels <= used, f"{where}: {labels - used}"


def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    used = {name for _, expr in expressions() for name in _NAME.findall(expr)}
    known = series_names()
    shown: set[str] = {known[name].name for name in used}

    def described(metric: Metric) -> bool:
        return metric.name in shown

    assert [metric.name for metric in CATALOG if not described(metric)] == []


def test_the_committed_dashboards_are_those_that_their_source_makes() -> None:
    made = load_tool("dashboards").files()
    folder = REPO / "deploy" / "grafana" / "dashboards"
    assert {path.name for path in folder.iterdir()} == made.keys()
    for name, text in made.items():
        assert (folder / name).read_text() == text, "run `make docs`"
        panels = json.loads(text)["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize("path", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_dashboards_are_of_grafanas_published_types_and_nothing_in_them_is_unknown(path: Path) -> None:
    """They read each panel by its kind; what they do not know would be missing when it is written again."""
    register_default_plugins()
    committed = json.loads(path.read_text())
    read = Dashboard.from_json(committed)
    written = json.loads(JSONEncoder().encode(read))
    assert list(lost(committed, written)) == []
    assert read.panels
    for panel in read.panels:
        if isinstance(panel, Panel):
            assert panel.targets
            assert all(isinstance(target, PrometheusQuery) for target in panel.targets)


def lost(before: object, after: object, path: str = "") -> Iterator[str]:
    """Where `after` has not what `before` has."""
    match before, after:
        case dict(), dict():
            for key, value in before.items():
                yield from lost(value, after[key], f"{path}.{key}") if key in after else (f"{path}.{key}",)
        case list(), list() if len(before) == len(after):
            for index, (one, other) in enumerate(zip(before, after, strict=True)):
                yield from lost(one, other, f"{path}[{index}]")
        case _:
            if before != after:
                yield path


def test_every_alert_has_a_section_that_says_what_to_do() -> None:
    page = (REPO / "docs" / "operations.md").read_text()
    anchors = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    for rule in rules():
        if "alert" in rule:
            runbook = rule["annotations"]["runbook"]  # type: ignore[index]  # YAML
            path, _, anchor = runbook.partition("#")
            assert path == "docs/operations.md"
            assert anchor in anchors, f"{rule['alert']}: no section {anchor}"
            assert str(rule["alert"]) in page


@pytest.mark.parametrize("name", ["prometheus.yml"])
def test_promtool_accepts_the_configuration_and_its_rules(name: str) -> None:
    command = [promtool(), "check", "config", str(PROMETHEUS / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_in_trouble_and_are_silent_otherwise() -> None:
    command = [promtool(), "test", "rules", str(REPO / "tests" / "deploy" / "alert_rules_test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
