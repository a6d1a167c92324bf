"""What a second thread is worth to the engine alone, on a CPU: `python -m benchmarks.threads`.

Both thread counts take turns in one process; the table has the best of each, in milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch
from pdcpu.library import HelperCore, computing

from pdserve.core.config import CacheSettings, ModelSettings
from pdserve.core.ids import BlockId
from pdserve.engine.batch import SequenceSlice
from pdserve.engine.build import Engine, build_engine
from pdserve.models import store

ROUNDS: Final = 4
CONTEXT: Final = 160
PROMPT: Final = 512


def _step(engine: Engine, slices: list[SequenceSlice]) -> Callable[[], object]:
    return lambda: engine.runner.forward(slices)


def cases(engine: Engine) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (step, how often it is timed in a round)."""
    size = engine.block_tokens
    prompt = [100 + i for i in range(PROMPT)]
    blocks = [BlockId(i) for i in range(-(-PROMPT // size))]
    per_sequence = -(-(CONTEXT + 1) // size)

    def decode(rows: int) -> list[SequenceSlice]:
        tables = [[BlockId(row * per_sequence + i) for i in range(per_sequence)] for row in range(rows)]
        return [SequenceSlice(tokens=[5], start=CONTEXT, blocks=table) for table in tables]

    return {
        f"prompt of {PROMPT}": (_step(engine, [SequenceSlice(tokens=prompt, start=0, blocks=blocks)]), 3),
        "decode 1": (_step(engine, decode(1)), 10),
        "decode 16": (_step(engine, decode(16)), 6),
    }


def _use(threads: int) -> None:
    """Of torch, and of our own kernels where the engine computes with them."""
    torch.set_num_threads(threads)
    if (library := computing()) is not None:
        library.set_helpers([HelperCore(None)] * (threads - 1))


def main() -> None:
    engine = build_engine(
        store.resolve(store.DEFAULT_MODEL), ModelSettings(), CacheSettings(), device="cpu", num_threads=1
    )
    best: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        for threads in (1, 2):
            _use(threads)
            for name, (step, repeats) in cases(engine).items():
                step()
                for _ in range(repeats):
                    begin = time.perf_counter()
                    step()
                    seconds = time.perf_counter() - begin
                    best[name, threads] = min(best.get((name, threads), seconds), seconds)
    print("| step, ms | 1 thread | 2 threads |\n|---|---|---|")
    for name in cases(engine):
        print(f"| {name} | {best[name, 1] * 1e3:.1f} | {best[name, 2] * 1e3:.1f} |")


if __name__ == "__main__":
    main()
