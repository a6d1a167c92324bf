"""A whole run against real servers leaves a page, tables and files that hold what was measured."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdserve.bench.cost import cost_by_rate, cost_of, hourly_cost
from pdserve.bench.duration import longest_run_s, longest_trial_s
from pdserve.bench.load import Progress
from pdserve.bench.records import RequestRecord, Trial
from pdserve.bench.report.charts import HeatMap, LineChart, charts_of
from pdserve.bench.report.files import COLUMNS, read_results
from pdserve.bench.report.png import write_pngs
from pdserve.bench.report.svg import draw
from pdserve.bench.report.write import write_report
from pdserve.bench.scenario import Scenario
from pdserve.bench.search import Goodput
from pdserve.bench.slo import PRESETS, Slo
from pdserve.bench.suite import Run, run_suite
from pdserve.cli.app import main


class Quiet:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def trial_began(self, system: str, rate: float, num_requests: int) -> None:
        pass

    def progressed(self, system: str, progress: Progress) -> None:
        pass

    def trial_ended(self, trial: Trial) -> None:
        self.trials.append(trial)


def scenario_of(systems: list[dict[str, Any]], **changes: Any) -> Scenario:
    base: dict[str, Any] = {
        "name": "a <test>",
        "arrivals": {"kind": "uniform"},
        "classes": [
            {"name": "quick", "input": {"value": 8}, "output": {"value": 3}, "slo": {"ttft_ms": 500}},
            {"name": "long", "input": {"value": 40}, "output": {"value": 3}, "slo": {"e2e_ms": 900}},
        ],
        "systems": systems,
        "duration_s": 0.4,
        "warmup_s": 0.1,
        "drain_s": 2.0,
        "min_requests": 1,
        "rates": [20, 40],
        "rounds": 2,
    }
    return Scenario.model_validate(base | changes)


async def against_fakes(fake_grpc: Any, fake_openai: Any, out: Path, observer: Quiet, **changes: Any) -> Run:
    async with fake_grpc[1]() as here, fake_openai[1]() as there:
        systems = [
            {"name": "ours & co", "address": here, "units": 2, "price_per_unit_hour": 3.0},
            {
                "name": "theirs",
                "address": there,
                "protocol": "openai",
                "api_key": "not-for-the-report",
                "units": 4,
            },
        ]
        return await run_suite(scenario_of(systems, **changes), out, observer)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_a_run_takes_turns_and_leaves_its_report(fake_grpc: Any, fake_openai: Any, tmp_path: Path) -> None:
    observer = Quiet()
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, observer))
    order = [(trial.round, trial.rate, trial.system) for trial in observer.trials]
    assert order[:2] == [(0, 20, "ours & co"), (0, 20, "theirs")]
    assert order[4:6] == [(1, 20, "theirs"), (1, 20, "ours & co")]
    for ours, theirs in zip(run.trials_of("ours & co"), run.trials_of("theirs"), strict=True):
        if ours.round == theirs.round and ours.rate == theirs.rate:
            assert [r.intended_s for r in ours.counted] == [r.intended_s for r in theirs.counted]
    written = write_report(run, tmp_path, png=False)
    names = {path.name for path in written}
    assert {"report.html", "results.json", "requests.csv"} <= names

    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    for needed in (
        "Goodput",
        "TTFT",
        "TPOT",
        "ITL",
        "p99",
        "ours & co",
        "theirs",
        "send lag",
        "quick",
        "seed",
    ):
        assert needed in page.text, needed
    charts = {attrs["id"] for tag, attrs in page.tags if tag == "svg"}
    assert {
        "attainment",
        "goodput",
        "ttft",
        "tpot",
        "itl",
        "e2e",
        "timeline-ours & co",
        "transfers",
        "cost",
    } <= charts
    assert sum("data-tip" in attrs for _, attrs in page.tags) > 50
    assert not [a for tag, a in page.tags if tag in ("link", "img") or a.get("src") or a.get("href")]
    assert "not-for-the-report" not in text + (tmp_path / "results.json").read_text()
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", text.lower())


def test_every_request_is_in_the_files(fake_grpc: Any, fake_openai: Any, tmp_path: Path) -> None:
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, Quiet(), rates=[20], rounds=1))
    write_report(run, tmp_path, png=False)
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == sum(len(trial.records) for trial in run.trials) == 20
    assert {row["met"] for row in rows if row["warmup"] == "False"} == {"True"}
    ours = [row for row in rows if row["system"] == "ours & co"]
    assert {row["bytes_moved"] for row in ours} == {"4096"}
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["requests"]) == 20
    assert document["environment"]["cores"] >= 1
    measured = read_results(tmp_path)
    assert len(measured) == sum(len(trial.counted) for trial in run.trials)
    assert all(one.ttft_s is not None and one.tpot_s is not None for one in measured)


def test_costs_are_of_tokens_inside_their_targets(fake_grpc: Any, fake_openai: Any, tmp_path: Path) -> None:
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, Quiet(), rates=[20], rounds=1))
    ours, theirs = run.systems
    assert hourly_cost(run, ours) == 2  # cores: the other has no price
    (trial,) = run.trials_of(ours.name)
    tokens_per_s = sum(record.output_tokens for record in trial.counted) / trial.wall_s
    ((rate, cores_h),) = cost_by_rate(run, ours)
    assert rate == 20
    assert cores_h == pytest.approx(2 * 1e6 / tokens_per_s / 3600)
    for record in trial.counted[1:]:
        record.error = "cut"
    assert cost_by_rate(run, ours)[0][1] == pytest.approx(cores_h * len(trial.counted), rel=0.01)
    theirs.price_per_unit_hour = 1.0
    assert hourly_cost(run, ours) == 6
    found = cost_of(run, ours, Goodput(attainment=0.9, rate=10.0, low=None, high=None))
    assert found is not None
    assert found.requests_per_price == 10 * 3600 / 6


def test_the_kv_that_was_moved_is_spread_over_the_seconds_in_which_it_was(
    fake_grpc: Any, fake_openai: Any, tmp_path: Path
) -> None:
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, Quiet(), rates=[20], rounds=1))
    (chart,) = [chart for chart in charts_of(run) if chart.key == "transfers"]
    assert isinstance(chart, LineChart)
    (line,) = chart.lines  # the other server does not say what it moved
    assert line.name == "ours & co"
    (trial,) = run.trials_of("ours & co")
    width_s = max(r.done_s or 0.0 for r in trial.records) / len(line.x)
    moved = sum(r.timings.bytes_moved for r in trial.records if r.timings is not None)
    assert sum(line.y) * width_s * 1e6 == pytest.approx(moved)


def test_two_of_one_arrangement_share_a_cell_of_the_heat_map(
    fake_grpc: Any, fake_openai: Any, tmp_path: Path
) -> None:
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, Quiet(), rates=[20], rounds=1))
    ours, theirs = run.systems
    for system, rate in ((ours, 3.0), (theirs, 2.0)):
        system.prefill, system.decode = 0, 1
        system.goodputs = [Goodput(attainment=0.9, rate=rate, low=None, high=None)]
    third = dataclasses.replace(ours, name="1P1D", prefill=1, goodputs=[])
    run.systems.append(third)
    (heat,) = [chart for chart in charts_of(run) if isinstance(chart, HeatMap)]
    assert heat.cells == [[3.0, None]]


def test_a_search_stays_inside_its_budget_however_slow_the_answers(
    fake_grpc: Any, fake_openai: Any, tmp_path: Path
) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    fake_grpc[0].gate = fake_openai[0].gate = never
    search = {"start_rate": 20, "budget_s": 2.5}
    changes: dict[str, Any] = {"rates": [], "search": search, "duration_s": 0.3, "drain_s": 0.4}
    observer = Quiet()
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, observer, **changes))
    trial_s = longest_trial_s(run.scenario, 20)
    assert 2 <= len(run.trials) <= 2 * (2.5 / trial_s)
    assert any("at most" in said for said in observer.said)


def test_what_is_run_by_default_ends_within_ten_minutes() -> None:
    # Starting two services takes half a minute each, and there is something to spare.
    assert longest_run_s(Scenario()) <= 450
    fixed = Scenario(rates=(1.0, 2.0), rounds=3, systems=Scenario().systems[:1])
    assert longest_run_s(fixed) == pytest.approx(3 + 10 + 3 * (2 + 30 + 10 + 2 + 15 + 10), abs=1)


def test_a_search_ends_with_all_systems_at_one_rate(fake_grpc: Any, fake_openai: Any, tmp_path: Path) -> None:
    fake_openai[0].gate = _only_so_many(30)
    search = {"start_rate": 20, "max_rate": 160, "budget_s": 8}
    observer = Quiet()
    run = asyncio.run(
        against_fakes(fake_grpc, fake_openai, tmp_path, observer, rates=[], search=search, duration_s=0.5)
    )
    theirs = next(system for system in run.systems if system.name == "theirs")
    assert theirs.goodputs
    assert theirs.goodputs[0].rate is not None
    assert {trial.system for trial in run.common_trials()} == {"ours & co", "theirs"}
    assert len({trial.rate for trial in run.common_trials()}) == 1
    assert write_report(run, tmp_path, png=False)


def test_a_server_that_refuses_every_request_is_left_out_and_named(
    fake_grpc: Any, fake_openai: Any, tmp_path: Path
) -> None:
    fake_grpc[0].refuse = grpc.StatusCode.INVALID_ARGUMENT
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, Quiet(), rates=[20], rounds=1))
    failed = {system.name: system.failed for system in run.systems}
    assert failed["ours & co"]
    assert not failed["theirs"]
    page = Page((write_report(run, tmp_path, png=False)[0]).read_text())
    assert "failed" in page.text


def test_plots_are_drawn_as_pictures_too_where_matplotlib_is(
    fake_grpc: Any, fake_openai: Any, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", exc_type=ImportError)
    run = asyncio.run(against_fakes(fake_grpc, fake_openai, tmp_path, Quiet(), rates=[20], rounds=1))
    heat = HeatMap(
        key="r",
        title="t",
        columns=["0", "1"],
        rows=["1"],
        cells=[[None, 2.0]],
        x_label="",
        y_label="",
        unit="",
    )
    for path in write_pngs([charts_of(run)[0], heat], tmp_path / "png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "2" in draw(heat)


def test_targets_are_judged_one_by_one() -> None:
    record = RequestRecord(
        system="x", rate=1, round=0, session=0, turn=0, class_name="c", warmup=False, intended_s=1.0,
        asked_output_tokens=4, slo=Slo(ttft_ms=400, tpot_ms=90, itl_p99_ms=150, e2e_ms=900),
    )  # fmt: skip
    assert record.missed() == ["error"]
    record.token_times_s, record.token_counts = [1.5, 1.6, 1.8], [1, 1, 2]
    record.done_s, record.output_tokens = 1.85, 4
    assert record.ttft_s == pytest.approx(0.5)
    assert record.tpot_s == pytest.approx(0.1)
    assert record.e2e_s == pytest.approx(0.85)
    assert record.missed() == ["ttft", "tpot", "itl_p99"]


def test_the_presets_are_mlperfs() -> None:
    limits = {name: (slo.ttft_ms, slo.tpot_ms) for name, slo in PRESETS.items()}
    assert limits == {
        "mlperf-llama2-70b": (2000, 200),
        "mlperf-llama2-70b-interactive": (450, 40),
        "mlperf-llama3.1-8b-interactive": (500, 30),
        "mlperf-llama3.1-405b": (6000, 175),
    }


@pytest.fixture
def address(fake_grpc: Any) -> Iterator[str]:
    """The fake server on a thread of its own, for commands that run a loop themselves."""
    loop, started, found = asyncio.new_event_loop(), threading.Event(), list[str]()
    stop = asyncio.Event()

    async def serve() -> None:
        async with fake_grpc[1]() as where:
            found.append(where)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pdserve", "bench", *args])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, captured.out, captured.err

    return run


def test_the_command_measures_prints_and_compares(
    cli: Callable[..., tuple[int, str, str]], address: str, tmp_path: Path
) -> None:
    scenario = tmp_path / "s.yaml"
    scenario.write_text("{warmup_s: 0, drain_s: 2, min_requests: 1}\n")
    options = [
        "-s",
        str(scenario),
        "-a",
        address,
        "--rates",
        "30",
        "--rounds",
        "5",
        "--duration",
        "0.3",
        "--no-png",
    ]
    code, out, err = cli(*options, "-o", str(tmp_path / "a"), "--slo", "mlperf-llama3.1-405b")
    assert code == 0, err
    assert "Goodput" in out
    assert "report.html" in out
    assert "inside (100%)" in err
    assert "matplotlib" not in out  # --no-png: nobody asked for them
    code, out, _ = cli("compare", str(tmp_path / "a"), str(tmp_path / "a"))
    assert code == 0
    assert "no real difference" in out
    document = json.loads((tmp_path / "a" / "results.json").read_text())
    for request in document["requests"]:
        request["tpot_s"] *= 3 + 0.01 * request["round"]
    (tmp_path / "b.json").write_text(json.dumps(document))
    code, out, _ = cli("compare", str(tmp_path / "a"), str(tmp_path / "b.json"), "--alpha", "0.1")
    assert code == 1
    assert "worse" in out


def test_it_says_what_is_left_out_without_matplotlib(
    cli: Callable[..., tuple[int, str, str]], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("png", "write"):
        monkeypatch.setattr(f"pdserve.bench.report.{module}.is_available", lambda: False)
    scenario = tmp_path / "s.yaml"
    scenario.write_text("{warmup_s: 0, drain_s: 2, min_requests: 1, duration_s: 0.2, rates: [30]}")
    code, out, _ = cli("-s", str(scenario), "-a", address, "-o", str(tmp_path / "o"))
    assert code == 0
    assert "no PNG files beside it: matplotlib is not installed" in out
    assert "95% interval" in out  # and a pipe gets every column whole
    assert not (tmp_path / "o" / "png").exists()


def test_a_trace_of_the_command_line_keeps_the_scenarios_scale(
    cli: Callable[..., tuple[int, str, str]], address: str, tmp_path: Path
) -> None:
    trace, scenario, out = tmp_path / "t.csv", tmp_path / "s.yaml", tmp_path / "o"
    rows = "".join(f"2023-11-16 18:15:{second:02d}.6805900,200,40\n" for second in range(50))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    scenario.write_text(
        "{replay: {path: elsewhere.csv, length_scale: 0.1}, warmup_s: 0, min_requests: 1, "
        "duration_s: 0.3, rates: [30]}"
    )
    code, _, err = cli("-s", str(scenario), "-a", address, "--trace", str(trace), "-o", str(out), "--no-png")
    assert code == 0, err
    requests = json.loads((out / "results.json").read_text())["requests"]
    assert {(one["prompt_tokens"], one["output_tokens"]) for one in requests} == {(20, 4)}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--scenario", "/no/such.yaml"], "/no/such.yaml"),
        (["--rates", "fast"], "--rates"),
        (["--rates", "-1"], "rates"),
        (["--slo", "instant"], "instant"),
        (["--goal", "2"], "goal"),
        (["--duration", "0"], "duration_s"),
        (["--address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--address", "http://127.0.0.1:1"], "127.0.0.1:1"),
        (["--out", "/dev/null/x", "--address", "127.0.0.1:1"], "--out"),
        (["--nonsense"], "--nonsense"),
        (["compare", "/no/a", "/no/b"], "/no/a"),
        (["compare"], "Missing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    cli: Callable[..., tuple[int, str, str]],
    args: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(*args)
    lines = [line for line in err.strip().splitlines() if not line.startswith("connecting to")]
    assert code == 2
    assert said in err
    assert len(lines) == 1, err


def test_help_names_what_it_is_for(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    assert "compare" in out


def _only_so_many(rate: float) -> Callable[[], Any]:
    """A server that takes requests one at a time, `rate` a second at most."""
    lock = asyncio.Lock()

    async def gate() -> None:
        async with lock:
            await asyncio.sleep(1 / rate)

    return gate
