"""Medians, spreads and ratios of a run, as JSON for machines and as Markdown for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from benchmarks.environment import Environment
from benchmarks.measure import Round, WarmUp
from benchmarks.workload import Workload

GIB: Final = 2**30


@dataclass(slots=True, kw_only=True)
class SystemResult:
    """All that is known of one system after a run, complete or not."""

    name: str
    describes: str
    kept_up: bool
    """Started once and frozen between its turns; False: started anew for every round."""
    commands: list[dict[str, object]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    warm_ups: list[WarmUp] = field(default_factory=list)
    rounds: dict[int, Round] = field(default_factory=dict)
    """By number of the round; a round that failed is missing."""
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    model: str
    dtype: str
    kv_gib: int
    workload: Workload
    environment: Environment
    num_rounds: int
    seed: int
    wall_s: float
    systems: list[SystemResult]


@dataclass(frozen=True, slots=True)
class Metric:
    title: str
    value: Callable[[Round], float]
    lower_is_better: bool
    digits: int


METRICS: Final = (
    Metric("TTFT, s", lambda r: r.ttft_s, True, 3),
    Metric("one stream, tok/s", lambda r: r.single_tokens_per_s, False, 1),
    Metric("concurrent streams, tok/s", lambda r: r.streams_tokens_per_s, False, 1),
    Metric("their TTFT, s", lambda r: r.streams_ttft_s, True, 3),
)
# `generate` streams no batches: the time of its first token is not known there.
UNKNOWN: Final = {("transformers-generate", "their TTFT, s")}


def to_json(run: Run) -> str:
    return json.dumps(asdict(run), indent=2) + "\n"


def to_markdown(run: Run) -> str:
    parts = [
        "# Serving benchmark",
        _conditions(run),
        "## Figures",
        "Median over the rounds (lowest-highest).",
        _figures(run),
        "## pdserve against each peer",
        "How many times as good the row is as the column's peer: the median over the rounds of the ratio "
        "within a round (lowest-highest). Above 1 the row is better.",
        *_ratios(run),
        "## Memory and start-up",
        _memory(run),
        "## How each was started",
        *_commands(run),
    ]
    errors = [f"- {system.name}: {error}" for system in run.systems for error in system.errors]
    if errors:
        parts += ["## What failed", "\n".join(errors)]
    return "\n\n".join(parts) + "\n"


def paired_ratios(ours: SystemResult, peer: SystemResult, metric: Metric) -> list[float]:
    """How many times as good `ours` is, for each round that both finished."""
    ratios = []
    for number in sorted(ours.rounds.keys() & peer.rounds.keys()):
        mine, theirs = metric.value(ours.rounds[number]), metric.value(peer.rounds[number])
        ratios.append(theirs / mine if metric.lower_is_better else mine / theirs)
    return ratios


def _conditions(run: Run) -> str:
    here, load = run.environment, run.workload
    dirty = " with uncommitted changes" if here.uncommitted_changes else ""
    flags = ", ".join(here.cpu_flags) or "none of note"
    lines = [
        f"- commit {here.commit}{dirty}; {here.started}; the whole run took {run.wall_s / 60:.0f} min",
        f"- {here.cpu}, {here.cores} cores ({flags}), {here.memory_gib} GiB, Linux {here.kernel}; "
        f"load average at start {here.load_before}",
        f"- {run.model}, {run.dtype}, {run.kv_gib} GiB of KV cache per engine, greedy, EOS ignored, "
        f"every prompt new (seed {run.seed})",
        f"- {run.num_rounds} rounds, systems in turn within each. TTFT: {load.ttft_prompt_tokens}-token "
        f"prompt alone, median of {load.ttft_repeats}. One stream: {load.single_prompt_tokens} in, "
        f"{load.single_output_tokens} out, tokens after the first. Concurrent: {load.streams} at once, "
        f"{load.stream_prompt_tokens} in, {load.stream_output_tokens} out, all output tokens over the "
        "whole time, reading included.",
        "- frozen (SIGSTOP) while others are measured: "
        + (_names(run, kept_up=True) or "none")
        + "; started anew for every round: "
        + (_names(run, kept_up=False) or "none"),
    ]
    return "\n".join(lines)


def _names(run: Run, *, kept_up: bool) -> str:
    return ", ".join(system.name for system in run.systems if system.kept_up is kept_up)


def _figures(run: Run) -> str:
    rows = []
    for system in run.systems:
        cells = [system.name]
        for metric in METRICS:
            values = [metric.value(one) for one in system.rounds.values()]
            known = (system.name, metric.title) not in UNKNOWN
            cells.append(_spread(values, metric.digits) if known else "-")
        rows.append(cells)
    return markdown_table(["system", *(metric.title for metric in METRICS)], rows)


def _ratios(run: Run) -> list[str]:
    ours = [system for system in run.systems if system.name.startswith("pdserve")]
    peers = [system for system in run.systems if not system.name.startswith("pdserve")]
    tables = []
    for metric in METRICS:
        rows = [
            [mine.name]
            + [
                "-" if (peer.name, metric.title) in UNKNOWN else _spread(paired_ratios(mine, peer, metric), 2)
                for peer in peers
            ]
            for mine in ours
        ]
        if rows and peers:
            tables += [f"**{metric.title}**", markdown_table(["", *(peer.name for peer in peers)], rows)]
    return tables or ["Nothing to compare: this run held no peer, or no pdserve."]


def _memory(run: Run) -> str:
    rows = []
    for system in run.systems:
        ups = system.warm_ups
        rows.append(
            [
                system.name,
                _spread([up.peak_serving_bytes / GIB for up in ups], 2),
                _spread([up.peak_start_bytes / GIB for up in ups], 2),
                _spread([up.start_s for up in ups], 0),
                _spread([up.idle_cores for up in ups], 2),
            ]
        )
    head = ["system", "peak serving, GiB", "peak starting, GiB", "start, s", "cores busy when idle"]
    note = "Memory is the summed PSS of all processes of a system, the benchmark's client left out."
    return f"{markdown_table(head, rows)}\n\n{note}"


def _commands(run: Run) -> list[str]:
    parts = []
    for system in run.systems:
        versions = ", ".join(f"{name} {version}" for name, version in system.versions.items())
        shown = [_command_line(command) for command in system.commands]
        parts.append(f"**{system.name}**: {system.describes} ({versions})")
        if shown:
            parts.append("```\n" + "\n".join(shown) + "\n```")
    return parts


def _command_line(command: Mapping[str, object]) -> str:
    env, argv = command["env"], command["argv"]
    words = [f"{name}={value}" for name, value in env.items()] if isinstance(env, dict) else []
    words += [f"'{word}'" if " " in word else word for word in argv] if isinstance(argv, list) else []
    return " ".join(words)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "failed"
    median = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
