"""What `benchmarks.policies` compares: traces, targets, fleets and policies; and one simulated run of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Final

from coordinator.planner.planner import PlannerRules
from coordinator.simulator.profile import GPUS, ModelSize, Profile, analytic
from coordinator.simulator.results import Tally, summarise
from coordinator.simulator.workload import Arrival, SlaClass, from_trace
from coordinator.simulator.world import Ended, Setup, World
from pdserve.bench.traces import TraceRow, read_trace
from pdserve.core.config import Admission, LocalPrefill, RoutingPolicy, WholeOnPrefill

LLAMA_8B: Final = ModelSize(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
LLAMA_70B: Final = ModelSize(params=70.6e9, layers=80, heads=64, kv_heads=8, head_dim=128)
COARSE: Final = 2048
"""Tokens of a step, at most: the smallest default of vLLM."""
CHUNKS: Final = (64, 128, 192, 256, 384, 768)
"""Token budgets that colocated workers are tuned with."""
LEAST_REQUESTS: Final = 600
LEARNING_S: Final = 6.0
"""Ten heartbeats and a little more: so much must be known of a worker before anything is refused for it."""
CONV: Final = "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"
CODE: Final = "azure-llm-2023/AzureLLMInferenceTrace_code.csv"
MOONCAKE: Final = "mooncake-fast25/conversation_trace.jsonl"


class Kind(StrEnum):
    OURS = "sla, best split"
    TUNED = "colocated, best step size"
    UNTUNED = f"colocated, sla, steps of {COARSE}"
    PLAIN = f"colocated, steps of {COARSE}, least loaded, nothing refused"
    NAMED = "best named policy, nothing refused"
    STATIC = "fixed split, least loaded, nothing refused"
    PART = "sla, a part of it changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace, a model on so many workers, and what its requests want."""

    name: str
    files: tuple[str, ...]
    ttft_s: float
    tpot_s: float
    rates: tuple[float, ...]
    """Requests per second of the whole fleet."""
    model: ModelSize = LLAMA_8B
    gpus: int = 1
    """Of one worker."""
    workers: int = 8
    splits: tuple[int, ...] = (3, 4, 5)
    """Prefill workers to try."""
    max_tokens: int = 8192
    everything: bool = False
    """Every named policy, and every part of ours switched off or on."""

    @property
    def profile(self) -> Profile:
        return analytic(self.model, GPUS["h100"], tensor_parallel=self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    kind: Kind
    setup: Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    case: Case
    variant: Variant
    rate: float
    traces: Path
    seconds: float

    @property
    def requests(self) -> int:
        return requests_in(self.seconds, self.rate)


def requests_in(seconds: float, rate: float) -> int:
    return max(round(seconds * rate), LEAST_REQUESTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one run came to."""

    case: str
    tpot_ms: float
    name: str
    kind: Kind
    rate: float
    goodput: float
    """Requests per second that met both targets."""
    attainment: float
    """Of the requests that were not refused."""
    refused: float
    """Of all requests."""
    ttft_p99_ms: float
    tpot_p99_ms: float


_MIXED: Final = Case(name="mixed, 8B", files=(CONV, CODE), ttft_s=0.5, tpot_s=0.015, rates=())
MAIN: Final = replace(
    _MIXED,
    name="mixed, 8B, 500 / 15 ms",
    rates=(50.0, 80.0, 100.0, 120.0, 150.0, 300.0),
    splits=(2, 3, 4, 5),
    everything=True,
)
SWEEP: Final = tuple(
    replace(_MIXED, name=f"mixed, 8B, 500 / {ms} ms", tpot_s=ms / 1e3, rates=rates, splits=splits)
    for ms, rates, splits in (
        (10, (50.0, 75.0, 100.0), (2, 3, 4)),
        (12, (60.0, 90.0, 120.0), (3, 4, 5)),
        (20, (80.0, 110.0, 140.0), (3, 4, 5)),
        (30, (80.0, 110.0, 140.0), (4, 5, 6)),
        (50, (80.0, 110.0, 140.0), (4, 5, 6)),
    )
)
OTHERS: Final = (
    replace(_MIXED, name="conversation, 8B, 500 / 15 ms", files=(CONV,), rates=(80.0, 110.0, 140.0)),
    replace(_MIXED, name="code, 8B, 500 / 15 ms", files=(CODE,), rates=(50.0, 80.0, 110.0), splits=(4, 5, 6)),
    replace(
        _MIXED,
        name="Mooncake conversation, 8B, 2000 / 15 ms",
        files=(MOONCAKE,),
        ttft_s=2.0,
        rates=(10.0, 15.0, 20.0),
        splits=(4, 5, 6),
        max_tokens=32768,
    ),
    replace(
        _MIXED,
        name="mixed, 70B on 4 GPUs each, 450 / 40 ms",
        model=LLAMA_70B,
        gpus=4,
        ttft_s=0.45,
        tpot_s=0.04,
        rates=(25.0, 40.0, 55.0),
        splits=(4, 5, 6),
    ),
    replace(
        _MIXED,
        name="mixed, 70B on 4 GPUs each, 450 / 25 ms",
        model=LLAMA_70B,
        gpus=4,
        ttft_s=0.45,
        tpot_s=0.025,
        rates=(25.0, 40.0, 55.0),
        splits=(3, 4, 5),
    ),
)
CASES: Final = (MAIN, *SWEEP, *OTHERS)


def variants(case: Case) -> list[Variant]:
    """Ours with each split, colocated workers tuned and not, and others' policies on the middle split."""
    profile, workers = case.profile, case.workers
    middle = case.splits[len(case.splits) // 2]
    ours = Setup(
        prefill=middle,
        decode=workers - middle,
        profile=profile,
        policy=RoutingPolicy.SLA,
        admission=Admission.TARGETS,
    )
    together = replace(ours, prefill=0, decode=workers)
    found = [
        _variant(f"sla, {n} + {workers - n}", Kind.OURS, replace(ours, prefill=n, decode=workers - n))
        for n in case.splits
    ]
    for chunk in CHUNKS:
        tuned = replace(profile, colocated_chunk_tokens=chunk)
        found.append(
            _variant(f"colocated, sla, steps of {chunk}", Kind.TUNED, replace(together, profile=tuned))
        )
    coarse = replace(together, profile=replace(profile, colocated_chunk_tokens=COARSE))
    found.append(_variant(f"colocated, sla, steps of {COARSE}", Kind.UNTUNED, coarse))
    plain = replace(coarse, policy=RoutingPolicy.LEAST_LOADED, admission=Admission.OFF)
    found.append(_variant(Kind.PLAIN, Kind.PLAIN, plain))
    if case in SWEEP:
        return found
    off = replace(ours, admission=Admission.OFF)
    fixed = replace(off, policy=RoutingPolicy.LEAST_LOADED, local_prefill=LocalPrefill.NEVER)
    found.append(_variant(f"least loaded, fixed {middle} + {workers - middle}", Kind.STATIC, fixed))
    policies = [p for p in RoutingPolicy if p is not RoutingPolicy.SLA]
    for policy in policies if case.everything else (RoutingPolicy.POWER_OF_TWO, RoutingPolicy.PREFIX_AWARE):
        named = f"{policy.value}, {middle} + {workers - middle}"
        found.append(_variant(named, Kind.NAMED, replace(off, policy=policy)))
    return found + (_parts(ours) if case.everything else [])


def _parts(ours: Setup) -> list[Variant]:
    fleet = f"{ours.prefill} + {ours.decode}"
    apart = replace(ours.profile, colocated_chunk_tokens=384, fused=False)
    return [
        _variant(
            f"sla, {fleet}, decode workers never read",
            Kind.PART,
            replace(ours, local_prefill=LocalPrefill.NEVER),
        ),
        _variant(
            f"sla, {fleet}, prefill workers keep short answers",
            Kind.PART,
            replace(ours, whole_on_prefill=WholeOnPrefill.AUTO),
        ),
        _variant(f"sla, {fleet}, nothing refused", Kind.PART, replace(ours, admission=Admission.OFF)),
        _variant(
            "colocated, sla, steps of 384 in two passes",
            Kind.PART,
            replace(ours, prefill=0, decode=ours.prefill + ours.decode, profile=apart),
        ),
    ]


def _variant(name: str, kind: Kind, setup: Setup) -> Variant:
    return Variant(name=name, kind=kind, setup=setup)


# --- arrivals -----------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def rows_of(files: tuple[str, ...], traces: Path, count: int) -> list[TraceRow]:
    """The beginning of each trace, as many of each, in turn at random; times are scaled to a rate later."""
    each = [read_trace(traces / name, limit=count // len(files)) for name in files]
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


def turning(traces: Path, seconds: float, case: Case) -> list[Arrival]:
    """The code trace, then the conversations, each at a rate that its best split can just serve."""
    code, talk = (
        arrivals_at(case, rows_of((name,), traces, requests_in(seconds, rate)), rate)
        for name, rate in ((CODE, 70.0), (CONV, 110.0))
    )
    later = code[-1].at_s - talk[0].at_s
    return [*code, *(replace(arrival, at_s=arrival.at_s + later) for arrival in talk)]


# --- runs ---------------------------------------------------------------------------------------------


def run(job: Job) -> Row:
    """Without the first quarter, nor the first seconds: until then workers' speeds are being learned."""
    arrivals = arrivals_at(job.case, rows_of(job.case.files, job.traces, job.requests), job.rate)
    first_s = arrivals[0].at_s
    begin_s = max(
        arrivals[len(arrivals) // 4].at_s, min(first_s + LEARNING_S, (first_s + arrivals[-1].at_s) / 2)
    )
    tally = Tally()

    def count(ended: Ended) -> None:
        if ended.arrival.at_s >= begin_s:
            tally.add(ended)

    world = World(job.variant.setup, arrivals, count).run()
    world.span_s = arrivals[-1].at_s - begin_s
    result = summarise(world, tally)
    everyone = result.all
    return Row(
        case=job.case.name,
        tpot_ms=job.case.tpot_s * 1e3,
        name=job.variant.name,
        kind=job.variant.kind,
        rate=job.rate,
        goodput=result.goodput,
        attainment=everyone.attainment,
        refused=everyone.refused / everyone.requests if everyone.requests else 0.0,
        ttft_p99_ms=everyone.ttft_p99_s * 1e3,
        tpot_p99_ms=everyone.tpot_p99_s * 1e3,
    )


PLANNED: Final = PlannerRules(interval_s=5.0, dwell_s=10.0)


def planned(setup: Setup) -> Setup:
    """The same workers, and the planner may change their roles."""
    return replace(setup, planner=PLANNED)
