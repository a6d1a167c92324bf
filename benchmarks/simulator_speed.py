"""How fast the simulator runs: `python -m benchmarks.simulator_speed --requests 1000000 --workers 1000`.

Prompts and answers as long as those of a trace, or of a fixed mix without one; Poisson arrivals at a rate
that keeps the fleet busy. The whole coordinator is in it: admission, `sla` placements, learning, reports.
"""

from __future__ import annotations

import argparse
import gc
import random
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, overload

from coordinator.simulator.profile import GPUS, ModelSize, analytic
from coordinator.simulator.results import Tally, summarise
from coordinator.simulator.workload import Arrival, SlaClass
from coordinator.simulator.world import Setup, World
from pdserve.bench.traces import read_trace
from pdserve.core.config import Admission, RoutingPolicy

_LLAMA_8B: Final = ModelSize(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
_MIX: Final = ((200, 150), (900, 230), (1500, 60), (2500, 20), (4000, 80))
"""(Prompt, answer) in tokens, where no trace is given."""
_WANTS: Final = SlaClass(name="all", ttft_s=1.0, tpot_s=0.03)


class Poisson(Sequence[Arrival]):
    """Arrivals that are made when they are asked for, in order: a million of them need no memory."""

    def __init__(self, lengths: Sequence[tuple[int, int]], count: int, rate: float) -> None:
        self._lengths, self._count, self._rate = lengths, count, rate
        rng, at = random.Random("arrivals"), 0.0
        for _ in range(count):
            at += rng.expovariate(rate)
        self._last = at

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Arrival: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Arrival]: ...

    def __getitem__(self, index: int | slice) -> Arrival | Sequence[Arrival]:
        """The first and the last, which are all that a world asks for by number."""
        if index == 0:
            return next(iter(self))
        if index == -1:
            prompt, answer = self._lengths[0]
            return Arrival(at_s=self._last, input_tokens=prompt, output_tokens=answer, sla=_WANTS)
        raise IndexError(f"wanted 0 or -1, got {index}: others are only made in turn")

    def __iter__(self) -> Iterator[Arrival]:
        rng, drawn, at = random.Random("arrivals"), random.Random("lengths"), 0.0
        for _ in range(self._count):
            at += rng.expovariate(self._rate)
            prompt, answer = drawn.choice(self._lengths)
            yield Arrival(at_s=at, input_tokens=prompt, output_tokens=answer, sla=_WANTS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator_speed", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1000, help="half of them prefill")
    parser.add_argument("--rate", type=float, default=9.0, help="requests per second and worker")
    parser.add_argument("--trace", type=Path, help="whose lengths are drawn from")
    chosen = parser.parse_args()
    lengths: Sequence[tuple[int, int]] = _MIX
    if chosen.trace is not None:
        lengths = [(min(r.input_tokens, 8000), r.output_tokens) for r in read_trace(chosen.trace)]
    arrivals = Poisson(lengths, chosen.requests, chosen.rate * chosen.workers)
    prefill = chosen.workers // 2
    setup = Setup(
        prefill=prefill,
        decode=chosen.workers - prefill,
        profile=analytic(_LLAMA_8B, GPUS["h100"]),
        policy=RoutingPolicy.SLA,
        admission=Admission.TTFT,
    )
    tally = Tally()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    run = World(setup, arrivals, tally.add).run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    result = summarise(run, tally)
    everyone = result.all
    print(
        f"{chosen.requests} requests, {chosen.workers} workers, {run.span_s:.1f} s of virtual time: "
        f"{cpu:.1f} s of CPU ({wall:.1f} s), {chosen.requests / cpu:.0f} requests/s and "
        f"{run.events / cpu:.0f} events/s; "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB"
    )
    print(
        f"goodput {result.goodput:.1f}/s, attainment {everyone.attainment:.1%}, "
        f"{everyone.refused} refused, {everyone.failed} failed, decisions {result.decisions}"
    )


if __name__ == "__main__":
    main()
