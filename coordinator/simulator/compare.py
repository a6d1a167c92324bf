"""The same workload under every policy, and against workers that read and write alike; as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coordinator.simulator.results import Result, Tally, summarise
from coordinator.simulator.workload import Arrival
from coordinator.simulator.world import Setup, World
from pdserve.core.config import Admission, RoutingPolicy

COLOCATED_CHUNKS = (128, 256, 512)
"""Token budgets that colocated workers are tried with, so that they are shown at their best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    setup: Setup
    result: Result


def simulate(setup: Setup, arrivals: Sequence[Arrival]) -> Result:
    tally = Tally()
    return summarise(World(setup, arrivals, tally.add).run(), tally)


def compare(
    base: Setup, arrivals: Sequence[Arrival], on_row: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Every policy on `base`'s fleet, then the same number of workers colocated."""
    variants: list[tuple[str, Setup]] = []
    for policy in RoutingPolicy:
        setup = replace(base, policy=policy, admission=Admission.OFF)
        variants.append((policy.value, setup))
    sla = replace(base, policy=RoutingPolicy.SLA)
    variants.append(("sla, refusing by TTFT target", replace(sla, admission=Admission.TTFT)))
    for chunk in COLOCATED_CHUNKS:
        profile = replace(base.profile, colocated_chunk_tokens=chunk)
        both = replace(sla, prefill=0, decode=base.prefill + base.decode, profile=profile)
        both = replace(both, admission=Admission.TTFT)
        variants.append((f"colocated, chunks of {chunk}, the same policy", both))
    rows = []
    for name, setup in variants:
        row = Row(name=name, setup=setup, result=simulate(setup, arrivals))
        on_row(row)
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| | workers | goodput/s | attainment | refused | failed | TTFT p50 / p99 | TPOT p50 / p99 | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        everyone, setup = row.result.all, row.setup
        fleet = f"{setup.prefill} + {setup.decode}" if setup.prefill else f"{setup.decode}"
        error = "" if row.result.ttft_error is None else f"{row.result.ttft_error:.1%}"
        lines.append(
            f"| {row.name} | {fleet} | {row.result.goodput:.2f} | {everyone.attainment:.1%} "
            f"| {everyone.refused} | {everyone.failed} "
            f"| {everyone.ttft_p50_s * 1e3:.0f} / {everyone.ttft_p99_s * 1e3:.0f} ms "
            f"| {everyone.tpot_p50_s * 1e3:.1f} / {everyone.tpot_p99_s * 1e3:.1f} ms | {error} |"
        )
    return "\n".join(lines) + "\n"
