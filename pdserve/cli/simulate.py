"""`pdserve simulate`: the coordinator's own decisions under a virtual clock, with modelled workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.console import ERR
from pdserve.core.config import Admission, RoutingPolicy


def simulate(
    trace: Annotated[
        Path, typer.Option(help="Azure CSV, or Mooncake .jsonl: when requests come, and how long they are.")
    ],
    model_config: Annotated[Path, typer.Option(help="config.json of a dense model.", metavar="FILE")],
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200.")] = "h100",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs per worker.")] = 1,
    prefill: Annotated[int, typer.Option(min=0, help="Workers that read prompts.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Workers that write answers.")] = 1,
    policy: Annotated[RoutingPolicy, typer.Option(help="How workers are chosen.")] = RoutingPolicy.SLA,
    admission: Annotated[Admission, typer.Option(help="What is refused at once.")] = Admission.DEADLINE,
    speed: Annotated[float, typer.Option(help="Play the trace this much faster.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")] = None,
    ttft_ms: Annotated[float, typer.Option(help="Target of every request.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Target of every request.")] = 50.0,
    max_len: Annotated[int, typer.Option(min=2, help="Longest prompt + answer; more is cut.")] = 8192,
    losses: Annotated[float, typer.Option(help="Losses per worker and hour.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed makes the same decisions.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Every policy, and colocated workers.")] = False,
) -> None:
    """Replay a trace against modelled workers: goodput, attainment, worker-hours, as a table."""
    from coordinator.simulator.compare import Row, table
    from coordinator.simulator.compare import compare as compare_all
    from coordinator.simulator.compare import simulate as simulate_one
    from coordinator.simulator.profile import ModelSize, analytic, gpu_named
    from coordinator.simulator.workload import SlaClass, from_trace
    from coordinator.simulator.world import Failures, Setup
    from pdserve.bench.traces import read_trace

    profile = analytic(ModelSize.from_config(model_config), gpu_named(gpu), tensor_parallel=tensor_parallel)
    everyone = SlaClass(name="all", ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3)
    arrivals = from_trace(
        read_trace(trace, limit=limit), [everyone], speed=speed, seed=seed, max_tokens=max_len
    )
    setup = Setup(
        prefill=prefill,
        decode=decode,
        profile=profile,
        policy=policy,
        admission=admission,
        seed=seed,
        failures=Failures(per_worker_hour=losses),
    )
    if compare:
        rows = compare_all(setup, arrivals, lambda row: ERR.print(f"{row.name}: done"))
    else:
        rows = [Row(name=policy.value, setup=setup, result=simulate_one(setup, arrivals))]
    typer.echo(table(rows), nl=False)
    hours = rows[0].result.worker_hours
    typer.echo(f"\n{len(arrivals)} requests, {hours:.2f} worker-hours, decisions {rows[0].result.decisions}")
