"""Arrivals have the statistics they are named after; workloads repeat; traces keep their prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.bench.arrivals import Arrivals
from pdserve.bench.distributions import Lengths
from pdserve.bench.scenario import Scenario, load_scenario, parse_scenario
from pdserve.bench.traces import read_trace
from pdserve.bench.workload import ServerLimits, build_workload
from pdserve.core.errors import ConfigError
from tests.support.paths import REPO

LIMITS = ServerLimits(vocab_size=1000, max_model_len=512)
LONG_S, RATE = 2000.0, 10.0


def times(**fields: Any) -> list[float]:
    return Arrivals.model_validate(fields).times(RATE, LONG_S, np.random.default_rng(7))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "poisson"},
        {"kind": "gamma", "cv": 3.0},
        {"kind": "uniform"},
        {"kind": "diurnal", "amplitude": 0.8, "period_s": 100},
        {"kind": "step", "factor": 4.0, "step_at": 0.3},
        {"kind": "step", "factor": 0.25},
    ],
)
def test_every_process_has_its_mean_rate_and_ascends(fields: dict[str, Any]) -> None:
    at = times(**fields)
    assert len(at) / LONG_S == pytest.approx(RATE, rel=0.06)
    assert at == sorted(at)
    assert at[0] >= 0
    assert at[-1] < LONG_S


@pytest.mark.parametrize(("fields", "cv"), [({"kind": "poisson"}, 1.0), ({"kind": "gamma", "cv": 3.0}, 3.0)])
def test_gaps_have_the_coefficient_of_variation_that_was_asked_for(fields: dict[str, Any], cv: float) -> None:
    gaps = np.diff(times(**fields))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.08)


def test_poisson_counts_vary_as_much_as_their_mean() -> None:
    counts, _ = np.histogram(times(kind="poisson"), bins=int(LONG_S))
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.12)


def test_a_day_has_a_peak_and_a_trough() -> None:
    at = np.array(times(kind="diurnal", amplitude=0.8, period_s=100)) % 100
    peak, trough = np.sum((at > 15) & (at < 35)), np.sum((at > 65) & (at < 85))
    assert peak / trough > 4


def test_a_step_multiplies_the_rate() -> None:
    at = np.array(times(kind="step", factor=4.0, step_at=0.5))
    assert np.sum(at >= LONG_S / 2) / np.sum(at < LONG_S / 2) == pytest.approx(4.0, rel=0.1)


def test_lengths_keep_their_bounds_and_median() -> None:
    lengths = Lengths.model_validate({"kind": "lognormal", "value": 100, "sigma": 0.8, "min": 20, "max": 300})
    drawn = [lengths.draw(np.random.default_rng(seed)) for seed in range(2000)]
    assert min(drawn) >= 20
    assert max(drawn) == 300
    assert np.median(drawn) == pytest.approx(100, rel=0.08)


def test_the_same_seed_makes_the_same_requests_and_another_does_not() -> None:
    scenario = Scenario()
    assert build_workload(scenario, 5, 1, LIMITS) == build_workload(scenario, 5, 1, LIMITS)
    assert build_workload(scenario, 5, 1, LIMITS) != build_workload(scenario, 5, 2, LIMITS)


def test_no_trial_finds_its_prompts_in_the_cache_of_another() -> None:
    scenario = Scenario.model_validate({"arrivals": {"kind": "uniform"}})
    first = build_workload(scenario, 5, 1, LIMITS).sessions[0]
    for other in (
        build_workload(scenario, 6, 1, LIMITS),
        build_workload(scenario, 5, 2, LIMITS),
        build_workload(scenario, 5, 1, LIMITS, salt=9),
    ):
        assert other.sessions[0].turns[0].new_tokens[:4] != first.turns[0].new_tokens[:4]
    salted = build_workload(scenario, 5, 1, LIMITS, salt=9).sessions[0]
    assert len(salted.turns[0].new_tokens) == len(first.turns[0].new_tokens)
    assert (salted.at_s, salted.turns[0].output_tokens) == (first.at_s, first.turns[0].output_tokens)


def test_prompts_are_new_except_for_their_shared_prefix() -> None:
    scenario = Scenario.model_validate({"classes": [{"shared_prefix": 32, "input": {"value": 40}}]})
    prompts = [session.turns[0].new_tokens for session in build_workload(scenario, 20, 0, LIMITS).sessions]
    assert len({prompt[:32] for prompt in prompts}) == 1
    assert len({prompt[32:] for prompt in prompts}) == len(prompts)
    assert all(len(prompt) == 72 for prompt in prompts)


def test_nothing_is_longer_than_the_context_and_what_was_cut_is_counted() -> None:
    scenario = Scenario.model_validate({"classes": [{"input": {"value": 600}, "output": {"value": 600}}]})
    workload = build_workload(scenario, 5, 0, LIMITS)
    assert workload.num_clipped == len(workload.sessions) > 0
    for session in workload.sessions:
        assert len(session.turns[0].new_tokens) + session.turns[0].output_tokens <= LIMITS.max_model_len


def test_classes_arrive_in_proportion_to_their_weights() -> None:
    scenario = Scenario.model_validate({"classes": [{"name": "a", "weight": 3}, {"name": "b"}]})
    sessions = build_workload(scenario, 100, 0, LIMITS).sessions
    share = sum(session.class_name == "a" for session in sessions) / len(sessions)
    assert share == pytest.approx(0.75, abs=0.05)


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:15:56.6805900,100,1
"""


def mooncake(path: Path) -> Path:
    rows = [
        {"timestamp": 1000 * i, "input_length": 1024, "output_length": 8, "hash_ids": [1, 100 + i // 2]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_azure_rows_are_read_with_times_from_the_first(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    rows = read_trace(file)
    assert [row.at_s for row in rows] == [0.0, 4.0, 10.0]
    assert (rows[0].input_tokens, rows[0].output_tokens) == (374, 44)
    assert len(read_trace(file, limit=2)) == 2


def test_a_replayed_trace_keeps_its_prefixes_and_takes_the_rate_it_is_given(tmp_path: Path) -> None:
    trace = read_trace(mooncake(tmp_path / "m.jsonl"))
    scenario = Scenario.model_validate(
        {"replay": {"path": "m.jsonl", "length_scale": 0.125}, "duration_s": 8, "warmup_s": 0}
    )
    workload = build_workload(scenario, 5, 0, LIMITS, trace=trace)
    assert len(workload.sessions) == 40
    assert workload.sessions[-1].at_s < 8
    prompts = [session.turns[0].new_tokens for session in workload.sessions]
    assert all(len(prompt) == 128 for prompt in prompts)
    assert len({prompt[:64] for prompt in prompts}) == 1  # block 1 is everyone's first
    assert prompts[0] == prompts[1]  # the same two blocks
    assert prompts[0][64:] != prompts[2][64:]
    assert all(session.turns[0].output_tokens == 1 for session in workload.sessions)


def test_a_trace_that_is_too_short_says_so(tmp_path: Path) -> None:
    trace = read_trace(mooncake(tmp_path / "m.jsonl"))
    scenario = Scenario.model_validate({"replay": {"path": "m.jsonl"}})
    with pytest.raises(ConfigError, match="40 requests"):
        build_workload(scenario, 100, 0, LIMITS, trace=trace)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "a,b\n1,2\n", "wanted columns"),
        ("t.csv", AZURE + "yesterday,1,2\n", "line 5"),
        ("t.csv", "", "wanted columns"),
        ("t.jsonl", "", "no requests"),
        ("t.jsonl", '{"timestamp": 1}\n', "line 1"),
        ("t.jsonl", "nonsense\n", "line 1"),
        ("t.jsonl", '{"timestamp": 0, "input_length": -5, "output_length": 1}\n', "negative"),
    ],
)
def test_a_trace_that_cannot_be_read_names_file_and_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"no_such": 1}, "no_such"),
        ({"classes": []}, "class"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"classes": [{"slo_preset": "fast"}]}, "fast"),
        ({"classes": [{"input": {"min": 9, "max": 3}}]}, "above"),
        ({"rates": [0]}, "above 0"),
        ({"systems": [{"name": "x", "protocol": "openai"}]}, "address"),
        ({"search": {"goal": 1.5}}, "search.goal"),
        ([], "valid"),
    ],
)
def test_a_scenario_that_cannot_be_run_names_the_key(raw: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_scenario(raw, "file.yaml")


@pytest.mark.parametrize("path", sorted((REPO / "benchmarks" / "sla").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_scenarios_that_come_along_are_valid(path: Path) -> None:
    assert load_scenario(path).systems
