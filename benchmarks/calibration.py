"""How far the simulator is from a real cluster: `python -m benchmarks.calibration --model DIR`.

One prefill and one decode worker are started on this machine as a user starts them. Lone prompts and small
batches give the simulator its profile; then the same requests at the same times go to the cluster and to the
simulator, and their TTFT and TPOT are compared. Requests of the replay are none of those of the profile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordinator.simulator.profile import Profile
from coordinator.simulator.workload import Arrival, SlaClass
from coordinator.simulator.world import Setup, World
from pdserve.bench.load import run_trial
from pdserve.bench.records import RequestRecord
from pdserve.bench.scenario import Scenario, SystemSpec
from pdserve.bench.servers import Server, serving
from pdserve.bench.workload import Session, Turn, Workload, build_workload
from pdserve.core.config import Admission, RoutingPolicy
from pdserve.core.errors import ConfigError

PROMPTS: Final = (16, 64, 160, 320, 480)
BATCHES: Final = ((1, 32), (2, 32), (4, 32), (8, 32), (1, 400), (4, 400), (8, 400))
"""(Sequences, tokens of each prompt)."""
_ANSWER: Final = 40
_QUANTILES: Final = (0.5, 0.9)
_SCENARIO: Final = Scenario.model_validate(
    {
        "name": "calibration",
        "classes": [
            {
                "input": {"kind": "lognormal", "value": 120, "sigma": 0.7, "min": 16, "max": 480},
                "output": {"kind": "lognormal", "value": 24, "sigma": 0.5, "min": 4, "max": 96},
            }
        ],
        "warmup_s": 0,
        "duration_s": 40,
        "drain_s": 60,
    }
)


async def ask_all(server: Server, lengths: Sequence[tuple[int, int]], seed: int) -> list[RequestRecord]:
    """All at once; (prompt, answer) in tokens."""
    random = np.random.default_rng(seed)
    sessions = []
    for index, (prompt, answer) in enumerate(lengths):
        tokens = tuple(int(t) for t in random.integers(100, server.limits.vocab_size // 2, prompt))
        turn = Turn(new_tokens=tokens, output_tokens=answer, think_s=0.0)
        slo = _SCENARIO.classes[0].targets
        sessions.append(
            Session(index=index, at_s=0.0, class_name="probe", slo=slo, priority=0, turns=(turn,))
        )
    trial = await run_trial(
        server.driver, Workload(sessions=sessions), system="probe", rate=1.0, round=0, drain_s=60.0
    )
    failed = next((record for record in trial.records if record.ttft_s is None), None)
    if failed is not None:
        wanted = max(prompt for prompt, _ in lengths)
        raise ConfigError(f"a probe of up to {wanted} tokens failed: {failed.error} {failed.error_text}")
    return trial.records


async def measure_profile(server: Server, repeats: int) -> Profile:
    """From lone prompts and small batches, the median of `repeats`."""
    await ask_all(server, [(300, 8)] * 4, seed=1)  # first transfers and caches
    reads: dict[int, list[float]] = {n: [] for n in PROMPTS}
    steps: dict[tuple[int, int], list[float]] = {b: [] for b in BATCHES}
    exposed: list[float] = []
    for repeat in range(repeats):
        for prompt in PROMPTS:
            (record,) = await ask_all(server, [(prompt, 2)], seed=1000 * repeat + prompt)
            reads[prompt].append(record.ttft_s or 0.0)
            if record.timings is not None:
                exposed.append(record.timings.transfer_exposed_s)
        for count, prompt in BATCHES:
            records = await ask_all(server, [(prompt, _ANSWER)] * count, seed=777 * repeat + prompt + count)
            # The last to begin sees the whole batch from its first token on; all end together.
            last = max(records, key=lambda r: r.ttft_s or 0.0)
            steps[count, prompt].append(last.tpot_s or 0.0)
    prefill = _fit([[1.0, n, n * n / 2] for n in PROMPTS], [float(np.median(reads[n])) for n in PROMPTS])
    decode = _fit(
        [[1.0, c, c * (n + _ANSWER / 2)] for c, n in BATCHES], [float(np.median(steps[b])) for b in BATCHES]
    )
    return Profile(
        prefill_step=prefill[0],
        prefill_token=max(prefill[1], 1e-6),
        prefill_pair=prefill[2],
        decode_step=decode[0],
        decode_seq=decode[1],
        decode_context=decode[2],
        transfer_latency=float(np.median(exposed)) if exposed else 1e-3,
        transfer_bytes_per_s=1e12,  # in the latency above
        kv_token_bytes=1000,
        num_blocks=4096,
        chunk_tokens=512,
    )


def _fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Least squares of relative errors, no coefficient below zero: the most negative goes first."""
    target = np.array(seconds)
    scaled: NDArray[np.float64] = np.array(rows) / target[:, None]
    kept = list(range(scaled.shape[1]))
    while True:
        found = np.linalg.lstsq(scaled[:, kept], np.ones(len(target)), rcond=None)[0]
        if found.min() >= 0:
            return [float(found[kept.index(i)]) if i in kept else 0.0 for i in range(scaled.shape[1])]
        del kept[int(found.argmin())]


async def replay(server: Server, workload: Workload, rate: float) -> list[RequestRecord]:
    trial = await run_trial(
        server.driver, workload, system="1P1D", rate=rate, round=0, drain_s=_SCENARIO.drain_s
    )
    return trial.counted


def simulated(profile: Profile, workload: Workload) -> list[tuple[float, float | None]]:
    """(TTFT, TPOT) of each request of `workload`, in order."""
    sla = SlaClass(name="all")
    arrivals = [
        Arrival(
            at_s=s.at_s,
            input_tokens=len(s.turns[0].new_tokens),
            output_tokens=s.turns[0].output_tokens,
            sla=sla,
        )
        for s in workload.sessions
    ]
    setup = Setup(prefill=1, decode=1, profile=profile, policy=RoutingPolicy.SLA, admission=Admission.OFF)
    ended = World(setup, arrivals).run().ended
    return [(e.report.ttft_s or 0.0, e.report.tpot_s) for e in ended]


def _row(name: str, real: list[float], modelled: list[float]) -> list[str]:
    rows = []
    for q in _QUANTILES:
        one, other = float(np.quantile(real, q)), float(np.quantile(modelled, q))
        rows.append(
            f"| {name} p{q * 100:.0f} | {one * 1e3:.1f} ms | {other * 1e3:.1f} ms | {other / one - 1:+.1%} |"
        )
    return rows


async def calibrate(spec: SystemSpec, rates: Sequence[float], repeats: int) -> str:
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as logs:
        async with serving(spec, Path(logs)) as server:
            profile = await measure_profile(server, repeats)
            lines.append(f"profile: {json.dumps({k: v for k, v in asdict(profile).items() if v})}\n")
            for seed, rate in enumerate(rates):
                workload = build_workload(_SCENARIO, rate, seed, server.limits)
                records = await replay(server, workload, rate)
                modelled = simulated(profile, workload)
                load = os.getloadavg()[0]
                lines.append(f"{len(records)} requests at {rate:g}/s; load average {load:.1f}\n")
                lines.append("| | cluster | simulator | error |\n|---|---|---|---|")
                lines += _row("TTFT", [r.ttft_s for r in records if r.ttft_s], [t for t, _ in modelled])
                lines += _row("TPOT", [r.tpot_s for r in records if r.tpot_s], [t for _, t in modelled if t])
                lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="as for `pdserve serve`; its default by default")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0, 2.0], help="requests per second")
    parser.add_argument("--repeats", type=int, default=3, help="of each probe of the profile")
    chosen = parser.parse_args()
    spec = SystemSpec(name="1P1D", prefill=1, decode=1, model=chosen.model)
    print(asyncio.run(calibrate(spec, chosen.rate, chosen.repeats)))


if __name__ == "__main__":
    main()
