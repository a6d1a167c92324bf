"""How far the simulator is from a real cluster: `python -m benchmarks.calibration --model DIR`.

One prefill and one decode worker are started on this machine as a user starts them. In each of several rounds
lone prompts and small batches are timed, then requests are replayed. The simulator gets its profile from the
medians of all rounds' probes, and the same requests at the same times; TTFT and TPOT of both are compared.

A machine that others use changes its speed between a probe and a replay, and then the figures say nothing of
the simulator: probes of one round that took much longer than those of another are reported, and the run is
called invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
BATCHES: Final = ((1, 32), (3, 32), (8, 32), (1, 400), (6, 400))
"""(Sequences, tokens of each prompt)."""
MOST_DRIFT: Final = 1.2
"""Slowest round over fastest, by the median of its probes, beyond which a run is not valid."""
_ANSWER: Final = 32
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
        "duration_s": 20,
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


@dataclass(slots=True)
class Probes:
    """Seconds, by what was asked; one value per round."""

    reads: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in PROMPTS})
    steps: dict[tuple[int, int], list[float]] = field(default_factory=lambda: {b: [] for b in BATCHES})
    exposed: list[float] = field(default_factory=list)

    async def measure(self, server: Server, round: int) -> None:
        for prompt in PROMPTS:
            (record,) = await ask_all(server, [(prompt, 2)], seed=1000 * round + prompt)
            self.reads[prompt].append(record.ttft_s or 0.0)
            if record.timings is not None:
                self.exposed.append(record.timings.transfer_exposed_s)
        for count, prompt in BATCHES:
            records = await ask_all(server, [(prompt, _ANSWER)] * count, seed=777 * round + prompt + count)
            # The last to begin sees the whole batch from its first token on; all end together.
            last = max(records, key=lambda r: r.ttft_s or 0.0)
            self.steps[count, prompt].append(last.tpot_s or 0.0)

    def drift(self) -> float:
        """Slowest round over fastest: the median over all probes of each one's time over its own median."""
        times = [*self.reads.values(), *self.steps.values()]
        relative = np.array([[t / float(np.median(values)) for t in values] for values in times])
        by_round = np.median(relative, axis=0)
        return float(by_round.max() / by_round.min())

    def profile(self) -> Profile:
        """From the median of each probe."""
        reads = [float(np.median(self.reads[n])) for n in PROMPTS]
        steps = [float(np.median(self.steps[b])) for b in BATCHES]
        prefill = _fit([[1.0, n, n * n / 2] for n in PROMPTS], reads)
        decode = _fit([[1.0, c, c * (n + _ANSWER / 2)] for c, n in BATCHES], steps)
        return Profile(
            prefill_step=prefill[0],
            prefill_token=max(prefill[1], 1e-6),
            prefill_pair=prefill[2],
            decode_step=decode[0],
            decode_seq=decode[1],
            decode_context=decode[2],
            transfer_latency=float(np.median(self.exposed)) if self.exposed else 1e-3,
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


Errors = dict[str, list[tuple[float, float]]]
"""(Cluster, simulator) of each round in seconds, by metric."""


def compare(
    errors: Errors, records: Sequence[RequestRecord], modelled: Sequence[tuple[float, float | None]]
) -> None:
    """Add one round's figures."""
    pairs = {
        "TTFT": ([r.ttft_s for r in records if r.ttft_s], [t for t, _ in modelled]),
        "TPOT": ([r.tpot_s for r in records if r.tpot_s], [t for _, t in modelled if t]),
    }
    for name, (real, simulated_s) in pairs.items():
        for q in _QUANTILES:
            both = float(np.quantile(real, q)), float(np.quantile(simulated_s, q))
            errors.setdefault(f"{name} p{q * 100:.0f}", []).append(both)
        means = float(np.mean(real)), float(np.mean(simulated_s))
        errors.setdefault(f"{name} mean", []).append(means)


def table(errors: Errors) -> str:
    """Medians over the rounds, and the error of each round."""
    lines = ["| | cluster | simulator | error, median of rounds | each round |", "|---|---|---|---|---|"]
    for name, rounds in errors.items():
        real, modelled = (float(np.median([pair[i] for pair in rounds])) * 1e3 for i in (0, 1))
        each = [other / one - 1 for one, other in rounds]
        lines.append(
            f"| {name} | {real:.1f} ms | {modelled:.1f} ms | {float(np.median(each)):+.1%} "
            f"| {', '.join(f'{error:+.0%}' for error in each)} |"
        )
    return "\n".join(lines) + "\n"


async def calibrate(spec: SystemSpec, rate: float, rounds: int) -> str:
    probes, replays = Probes(), list[tuple[Workload, list[RequestRecord]]]()
    with tempfile.TemporaryDirectory() as logs:
        async with serving(spec, Path(logs)) as server:
            await ask_all(server, [(300, 8)] * 4, seed=1)  # first transfers and caches
            for round in range(rounds):
                await probes.measure(server, round)
                workload = build_workload(_SCENARIO, rate, round, server.limits)
                replays.append((workload, await replay(server, workload, rate)))
            await probes.measure(server, rounds)
    profile, errors, drift = probes.profile(), Errors(), probes.drift()
    for workload, records in replays:
        compare(errors, records, simulated(profile, workload))
    count = sum(len(records) for _, records in replays)
    verdict = "valid" if drift <= MOST_DRIFT else "NOT VALID: the machine was not quiet"
    return "\n".join(
        [
            f"{count} requests at {rate:g}/s in {rounds} rounds; load average {os.getloadavg()[0]:.1f}; the "
            f"slowest round of probes took {drift:.2f} times as long as the fastest: {verdict}\n",
            table(errors),
            f"profile: {json.dumps({k: v for k, v in asdict(profile).items() if v})}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as for `pdserve serve`; its default by default")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--rounds", type=int, default=3, help="of probes and a replay")
    chosen = parser.parse_args()
    spec = SystemSpec(name="1P1D", prefill=1, decode=1, model=chosen.model)
    print(asyncio.run(calibrate(spec, chosen.rate, chosen.rounds)))


if __name__ == "__main__":
    main()
