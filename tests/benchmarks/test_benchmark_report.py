"""Ratios are taken within a round and point the same way for every metric; a failed system keeps its row."""

from __future__ import annotations

import json

import pytest

from benchmarks.environment import Environment
from benchmarks.measure import Round, WarmUp
from benchmarks.report import METRICS, Run, SystemResult, paired_ratios, to_json, to_markdown
from benchmarks.system import Answer, WrongAnswer
from benchmarks.workload import FULL, Prompt

HERE = Environment(
    cpu="a CPU",
    cpu_flags=("avx2",),
    cores=2,
    memory_gib=4.0,
    kernel="6",
    python="3.11",
    commit="abc",
    uncommitted_changes=False,
    load_before=0.0,
    started="2026-01-01T00:00:00+00:00",
)


def one_round(*, ttft_s: float, tokens_per_s: float) -> Round:
    return Round(
        ttft_s=ttft_s,
        single_tokens_per_s=tokens_per_s,
        streams_tokens_per_s=tokens_per_s,
        streams_ttft_s=ttft_s,
    )


def result(name: str, rounds: dict[int, Round]) -> SystemResult:
    warm_up = WarmUp(start_s=1.0, peak_start_bytes=2**30, peak_serving_bytes=2**31, idle_cores=0.0)
    return SystemResult(name=name, describes="a system", kept_up=True, warm_ups=[warm_up], rounds=rounds)


def run_of(*systems: SystemResult) -> Run:
    return Run(
        model="m",
        dtype="bfloat16",
        kv_gib=1,
        workload=FULL,
        environment=HERE,
        num_rounds=2,
        seed=0,
        wall_s=60.0,
        systems=list(systems),
    )


def test_twice_as_fast_is_a_ratio_of_two_for_times_and_for_rates() -> None:
    ours = result("pdserve", {0: one_round(ttft_s=1.0, tokens_per_s=20.0)})
    peer = result("vllm", {0: one_round(ttft_s=2.0, tokens_per_s=10.0)})
    assert [paired_ratios(ours, peer, metric) for metric in METRICS] == [[2.0]] * len(METRICS)


def test_only_rounds_that_both_finished_are_compared() -> None:
    ours = result("pdserve", {number: one_round(ttft_s=1.0, tokens_per_s=1.0) for number in (0, 2)})
    peer = result("vllm", {number: one_round(ttft_s=3.0, tokens_per_s=1.0) for number in (1, 2)})
    assert paired_ratios(ours, peer, METRICS[0]) == [3.0]


def test_a_failed_system_keeps_its_row_and_its_reason() -> None:
    ours = result("pdserve", {0: one_round(ttft_s=1.0, tokens_per_s=20.0)})
    peer = result("vllm", {})
    peer.errors.append("start-up: out of memory")
    run = run_of(ours, peer)
    page = to_markdown(run)
    assert "| vllm | failed |" in page
    assert "- vllm: start-up: out of memory" in page
    assert json.loads(to_json(run))["systems"][1]["errors"] == ["start-up: out of memory"]


def test_an_answer_of_another_length_than_asked_is_an_error() -> None:
    prompt = Prompt((1, 2, 3), " a b c")
    answer = Answer(sent_s=0.0, first_s=1.0, last_s=2.0, prompt_tokens=4, output_tokens=8)
    with pytest.raises(WrongAnswer, match=r"asked for \(3, 8\), the system counted \(4, 8\)"):
        answer.check(prompt, 8)
