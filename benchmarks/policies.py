"""Goodput under SLO in the simulator: every policy, every split, and colocated serving.

    python -m benchmarks.policies --traces DIR --out docs/images       tables on stdout, charts as PNG

DIR holds azure-llm-2023/ and mooncake-fast25/ as their authors publish them. Times of workers are modelled
from data sheets (`coordinator.simulator.profile`), not measured.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from coordinator.simulator.profile import GPUS, ModelSize, Profile, analytic
from coordinator.simulator.results import Result, Tally, good, summarise
from coordinator.simulator.workload import Arrival, SlaClass, from_trace
from coordinator.simulator.world import Ended, Setup, World
from pdserve.bench.traces import TraceRow, read_trace
from pdserve.core.config import Admission, LocalPrefill, RoutingPolicy
from pdserve.core.errors import Overloaded

LLAMA_8B: Final = ModelSize(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
LLAMA_70B: Final = ModelSize(params=70.6e9, layers=80, heads=64, kv_heads=8, head_dim=128)
CHUNKS: Final = (192, 256, 384, 768, 2048)
"""Token budgets of colocated workers' steps; 2048 is vLLM's smallest default."""
WORKERS: Final = 4
_CONV: Final = "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
_CODE: Final = "azure-llm-2023/AzureLLMInferenceTrace_code.csv"
_MOONCAKE: Final = "mooncake-fast25/conversation_trace.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace, a model and what its requests want."""

    name: str
    files: tuple[str, ...]
    ttft_s: float
    tpot_s: float
    rates: tuple[float, ...]
    """Requests per second to try."""
    model: ModelSize = LLAMA_8B
    gpus: int = 1
    max_tokens: int = 8192
    everything: bool = False
    """Also every named policy, and overload."""


CASES: Final = (
    Case(
        name="mixed, 8B, 500 / 15 ms",
        files=(_CONV, _CODE),
        ttft_s=0.5,
        tpot_s=0.015,
        rates=(40.0, 50.0, 60.0),
        everything=True,
    ),
    Case(
        name="mixed, 8B, 500 / 30 ms",
        files=(_CONV, _CODE),
        ttft_s=0.5,
        tpot_s=0.03,
        rates=(25.0, 45.0, 60.0),
    ),
    Case(
        name="mixed, 8B, 500 / 12 ms",
        files=(_CONV, _CODE),
        ttft_s=0.5,
        tpot_s=0.012,
        rates=(25.0, 45.0, 60.0),
    ),
    Case(
        name="conversation, 8B, 500 / 15 ms",
        files=(_CONV,),
        ttft_s=0.5,
        tpot_s=0.015,
        rates=(45.0, 60.0),
    ),
    Case(name="code, 8B, 500 / 15 ms", files=(_CODE,), ttft_s=0.5, tpot_s=0.015, rates=(30.0, 50.0)),
    Case(
        name="Mooncake conversation, 8B, 2000 / 15 ms",
        files=(_MOONCAKE,),
        ttft_s=2.0,
        tpot_s=0.015,
        rates=(6.0, 10.0),
        max_tokens=32768,
    ),
    Case(
        name="mixed, 70B on 4 GPUs each, 450 / 40 ms",
        files=(_CONV, _CODE),
        ttft_s=0.45,
        tpot_s=0.04,
        rates=(14.0, 22.0),
        model=LLAMA_70B,
        gpus=4,
    ),
)


@dataclass(slots=True)
class Line:
    """A set-up at the rate that gave most goodput."""

    name: str
    setup: Setup
    rate: float = 0.0
    result: Result | None = None
    by_rate: dict[float, Result] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        return 0.0 if self.result is None else self.result.goodput


def rows_of(case: Case, traces: Path, count: int) -> list[TraceRow]:
    """The beginning of each trace, as many of each, in turn at random; times are scaled to a rate later."""
    each = [read_trace(traces / name, limit=count // len(case.files)) for name in case.files]
    if len(each) == 1:
        return each[0]
    rows = [row for trace in each for row in trace]
    random.Random(0).shuffle(rows)
    # Poisson: two recordings have no common clock.
    rng, at, mixed = random.Random(1), 0.0, []
    for row in rows:
        at += rng.expovariate(1.0)
        mixed.append(replace(row, at_s=at))
    return mixed


def arrivals_at(case: Case, rows: Sequence[TraceRow], rate: float) -> list[Arrival]:
    speed = rate * (rows[-1].at_s - rows[0].at_s) / (len(rows) - 1)
    wants = SlaClass(name="all", ttft_s=case.ttft_s, tpot_s=case.tpot_s)
    return from_trace(rows, [wants], speed=speed, seed=0, max_tokens=case.max_tokens)


def measured(setup: Setup, arrivals: Sequence[Arrival]) -> Result:
    """Without the first quarter of the requests: until then workers' speeds are being learned."""
    begin_s = arrivals[len(arrivals) // 4].at_s
    tally = Tally()

    def count(ended: Ended) -> None:
        if ended.arrival.at_s >= begin_s:
            tally.add(ended)

    run = World(setup, arrivals, count).run()
    run.span_s = arrivals[-1].at_s - begin_s
    return summarise(run, tally)


def set_ups(case: Case, profile: Profile) -> list[Line]:
    sla = Setup(
        prefill=1,
        decode=WORKERS - 1,
        profile=profile,
        policy=RoutingPolicy.SLA,
        admission=Admission.TARGETS,
    )
    lines = [
        Line(f"sla, {n} + {WORKERS - n}", replace(sla, prefill=n, decode=WORKERS - n))
        for n in range(1, WORKERS)
    ]
    apart = replace(sla, prefill=2, decode=2, local_prefill=LocalPrefill.NEVER)
    lines.append(Line("sla, 2 + 2, prompts never read by decode workers", apart))
    for chunk in CHUNKS:
        budget = replace(profile, colocated_chunk_tokens=chunk)
        together = replace(sla, prefill=0, decode=WORKERS, profile=budget)
        lines.append(Line(f"colocated, sla, steps of {chunk}", together))
    plain = replace(profile, colocated_chunk_tokens=2048)
    load = replace(
        sla,
        prefill=0,
        decode=WORKERS,
        profile=plain,
        policy=RoutingPolicy.LEAST_LOADED,
        admission=Admission.OFF,
    )
    lines.append(Line("colocated, least loaded, steps of 2048, nothing refused", load))
    if case.everything:
        apart_passes = replace(profile, colocated_chunk_tokens=384, fused=False)
        both = replace(sla, prefill=0, decode=WORKERS, profile=apart_passes)
        lines.append(Line("colocated, sla, steps of 384 in two passes", both))
        for policy in RoutingPolicy:
            if policy is not RoutingPolicy.SLA:
                named = replace(sla, prefill=2, decode=2, policy=policy, admission=Admission.OFF)
                lines.append(Line(f"{policy.value}, 2 + 2, nothing refused", named))
    return lines


def run_case(case: Case, traces: Path, count: int) -> list[Line]:
    rows = rows_of(case, traces, count)
    lines = set_ups(case, analytic(case.model, GPUS["h100"], tensor_parallel=case.gpus))
    for line in lines:
        for rate in case.rates:
            result = measured(line.setup, arrivals_at(case, rows, rate))
            line.by_rate[rate] = result
            if result.goodput > line.goodput:
                line.rate, line.result = rate, result
        print(f"  {line.name}: {line.goodput:.1f}", file=sys.stderr, flush=True)
    return lines


def overload(case: Case, traces: Path, count: int, best: Line) -> str:
    """Three times the capacity, and how many refusals were wrong at the rate of the best goodput."""
    rows = rows_of(case, traces, count)
    over = measured(best.setup, arrivals_at(case, rows, 3 * best.goodput))
    arrivals = arrivals_at(case, rows, best.rate)
    taken = replace(best.setup, admission=Admission.OFF)
    kept = {e.report.id: e for e in World(taken, arrivals).run().ended}
    refused = [e for e in World(best.setup, arrivals).run().ended if isinstance(e.outcome, Overloaded)]
    wrong = sum(good(kept[e.report.id]) for e in refused)
    part = wrong / len(refused) if refused else 0.0
    return (
        f"{best.name}: at 3 x {best.goodput:.1f} requests/s goodput is {over.goodput:.1f}/s, "
        f"{over.goodput / best.goodput:.0%} of its peak, attainment {over.all.attainment:.1%}. "
        f"Of {len(refused)} refusals at {best.rate:g}/s {wrong} ({part:.1%}) would have met their targets "
        "with nothing refused.\n"
    )


def table(case: Case, lines: Iterable[Line]) -> str:
    out = [
        f"### {case.name}\n",
        "| | goodput/s | at | attainment | refused | TTFT p99 | TPOT p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if line.result is None:
            out.append(f"| {line.name} | 0 | | | | | |")
            continue
        everyone = line.result.all
        out.append(
            f"| {line.name} | {line.goodput:.1f} | {line.rate:g}/s | {everyone.attainment:.1%} "
            f"| {everyone.refused / everyone.requests:.0%} | {everyone.ttft_p99_s * 1e3:.0f} ms "
            f"| {everyone.tpot_p99_s * 1e3:.1f} ms |"
        )
    return "\n".join(out) + "\n"


def chart(cases: Sequence[tuple[Case, list[Line]]], path: Path) -> None:
    """Goodput of the best of each kind, one group of bars per case."""
    # Not pyplot: it may want a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, Callable[[str], bool]] = {
        "sla, best split": lambda name: name.startswith("sla"),
        "colocated, best step size": lambda name: name.startswith("colocated, sla") and "passes" not in name,
        "colocated, steps of 2048": lambda name: name == "colocated, sla, steps of 2048",
        "colocated, nothing refused": lambda name: name.startswith("colocated, least"),
    }
    figure = Figure(figsize=(9, 4.2))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (kind, belongs) in enumerate(kinds.items()):
        heights = [
            max((line.goodput for line in lines if belongs(line.name)), default=0.0) for _, lines in cases
        ]
        axes.bar([i + 0.2 * index for i in range(len(cases))], heights, 0.2, label=kind)
    axes.set_xticks([i + 0.3 for i in range(len(cases))])
    axes.set_xticklabels([case.name.replace(", ", "\n") for case, _ in cases], fontsize=7)
    axes.set_ylabel("requests/s that met both targets")
    axes.set_title("Simulated goodput of four H100 workers", fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for charts; none by default")
    parser.add_argument("--requests", type=int, default=2000, help="of each trace or mix")
    parser.add_argument("--only", help="cases whose name has this in it")
    chosen = parser.parse_args()
    done: list[tuple[Case, list[Line]]] = []
    for case in CASES:
        if chosen.only and chosen.only not in case.name:
            continue
        print(case.name, file=sys.stderr, flush=True)
        lines = run_case(case, chosen.traces, chosen.requests)
        done.append((case, lines))
        print(table(case, lines), flush=True)
        if chosen.out is not None:
            chart(done, chosen.out / "goodput.png")
        if case.everything:
            ours = [line for line in lines if line.name.startswith("sla")]
            best = max(ours, key=lambda line: line.goodput)
            print(overload(case, chosen.traces, chosen.requests, best), flush=True)


if __name__ == "__main__":
    main()
