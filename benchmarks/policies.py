"""Goodput under SLO in the simulator: every policy and split, colocated serving, overload, the planner.

    python -m benchmarks.policies --traces DIR --out docs/images     tables on stdout; charts, JSON in OUT

DIR holds azure-llm-2023/ and mooncake-fast25/ as their authors publish them. Times of workers are modelled
from data sheets (`coordinator.simulator.profile`), not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.policy_cases import (
    CASES,
    MAIN,
    Job,
    Kind,
    Row,
    arrivals_at,
    planned,
    requests_in,
    rows_of,
    run,
    turning,
    variants,
)
from benchmarks.policy_report import best_of, charts, summary, table
from coordinator.simulator.compare import simulate
from coordinator.simulator.results import good
from coordinator.simulator.world import Setup, World
from pdserve.core.config import Admission
from pdserve.core.errors import Overloaded


def jobs(traces: Path, seconds: float, only: str) -> list[Job]:
    return [
        Job(case=case, variant=variant, rate=rate, traces=traces, seconds=seconds)
        for case in CASES
        if only in case.name
        for variant in variants(case)
        for rate in case.rates
    ]


def run_all(work: Sequence[Job], processes: int) -> list[Row]:
    rows: list[Row] = []
    began = time.monotonic()
    with ProcessPoolExecutor(processes) as pool:
        for row in pool.map(run, work):
            rows.append(row)
            if len(rows) % 20 == 0 or len(rows) == len(work):
                spent = time.monotonic() - began
                print(f"{len(rows)} of {len(work)} runs, {spent:.0f} s", file=sys.stderr, flush=True)
    return rows


def ours(rows: Sequence[Row]) -> tuple[Setup, Row] | None:
    """The best split of the main case."""
    top = best_of(rows, MAIN, Kind.OURS)
    if top is None:
        return None
    return next(v.setup for v in variants(MAIN) if v.name == top.name), top


def wrong_refusals(setup: Setup, rate: float, traces: Path, seconds: float) -> tuple[int, int]:
    """(Refused, of these how many would have met their targets had nothing been refused)."""
    arrivals = arrivals_at(MAIN, rows_of(MAIN.files, traces, requests_in(seconds, rate)), rate)
    kept = {e.report.id: e for e in World(replace(setup, admission=Admission.OFF), arrivals).run().ended}
    refused = [e for e in World(setup, arrivals).run().ended if isinstance(e.outcome, Overloaded)]
    return len(refused), sum(good(kept[e.report.id]) for e in refused)


def overload(rows: Sequence[Row], traces: Path, seconds: float) -> str:
    found = ours(rows)
    if found is None:
        return ""
    setup, top = found
    over = max((r for r in rows if r.case == MAIN.name and r.name == top.name), key=lambda row: row.rate)
    text = (
        f"{top.name}: at {over.rate:g} requests/s, {over.rate / top.goodput:.1f} times its peak goodput, "
        f"goodput is {over.goodput:.1f}/s ({over.goodput / top.goodput:.0%} of the peak), attainment "
        f"{over.attainment:.1%}.\n"
    )
    for rate in (top.rate, over.rate):
        refused, wrong = wrong_refusals(setup, rate, traces, seconds)
        part = wrong / refused if refused else 0.0
        text += (
            f"Of {refused} refusals at {rate:g}/s {wrong} ({part:.1%}) would have met their targets with "
            "nothing refused.\n"
        )
    return text


def planner(traces: Path, seconds: float, processes: int) -> str:
    """A load that turns from prompts to answers, on every fixed split, and from the middle with the planner.

    Each part takes ten times `seconds`: a planner needs time to see what has changed.
    """
    arrivals, base = turning(traces, 10 * seconds, MAIN), variants(MAIN)[0].setup
    workers = MAIN.workers
    splits = [replace(base, prefill=n, decode=workers - n) for n in range(1, workers)]
    setups = [*splits, planned(splits[workers // 2 - 1])]
    with ProcessPoolExecutor(processes) as pool:
        found = [result.goodput for result in pool.map(simulate, setups, [arrivals] * len(setups))]
    fixed = dict(zip([s.prefill for s in splits], found, strict=False))
    top = max(fixed, key=lambda n: fixed[n])
    listed = ", ".join(f"{n} + {workers - n}: {value:.1f}" for n, value in fixed.items())
    return (
        f"Code, then conversations ({len(arrivals)} requests). Fixed splits: {listed} requests/s in time. "
        f"The planner, from {workers // 2} + {workers // 2}: {found[-1]:.1f}, "
        f"{found[-1] / fixed[top]:.0%} of the best of them ({top} + {workers - top}).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for charts and policies.json; none by default")
    parser.add_argument("--seconds", type=float, default=24.0, help="of virtual time in each run")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    chosen = parser.parse_args()
    began = time.monotonic()
    work = jobs(chosen.traces, chosen.seconds, chosen.only)
    rows = run_all(work, chosen.jobs)
    sections = [
        f"{len(work)} runs of {chosen.seconds:g} s, the first of which are not counted. Best goodput of each "
        "over its rates, splits and step sizes; ratios are ours over theirs.\n",
        summary(rows),
        *(table(case, rows) for case in CASES if any(row.case == case.name for row in rows)),
    ]
    if MAIN.name in {row.case for row in rows}:
        sections += ["### Overload and refusals\n", overload(rows, chosen.traces, chosen.seconds)]
        sections += ["### Planner\n", planner(chosen.traces, chosen.seconds, chosen.jobs)]
    print("\n".join(sections))
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "policies.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
        charts(rows, chosen.out)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
