"""The steps of `benchmarks.engine` on llama.cpp, by its own `llama-batched-bench`: same shape, threads, bf16.

Random weights of the shape are written once, with a tokenizer, and converted as for the serving benchmark.
llama.cpp runs in a process of its own, before the others: its turns are not among theirs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.checkpoint import write_checkpoint
from benchmarks.environment import REPO
from benchmarks.peers import LLAMACPP, batched_bench
from benchmarks.shapes import Shape
from benchmarks.systems.llamacpp import to_gguf
from pdserve.models.store import DEFAULT_MODEL, resolve

STEPS: Final = 16
"""Tokens that each stream writes after the context: the mean is a step's time."""
REPEATS: Final = 3
BATCH_TOKENS: Final = 2048


class PeerFailed(Exception):
    """llama.cpp did not run to its end; the message holds its last words."""


def llamacpp_checkpoint(shape: Shape, root: Path = REPO) -> Path:
    """The shape as a GGUF file, written once."""
    folder = root / "out" / "models" / f"random-{shape.name}"
    if not (folder / "model.safetensors.index.json").exists():
        write_checkpoint(shape, resolve(DEFAULT_MODEL), folder)
    return to_gguf(folder, root, folder / "convert.log")


def prompt_seconds(gguf: Path, tokens: int, threads: int, root: Path = REPO) -> float:
    """The best of some readings of a prompt."""
    runs = [_run(gguf, threads, tokens, 1, (1,), root) for _ in range(REPEATS)]
    return min(float(run["t_pp"]) for (run,) in runs)


def step_seconds(
    gguf: Path, context: int, streams: Sequence[int], threads: int, root: Path = REPO
) -> dict[int, float]:
    """Of one token for every stream, by the number of streams, best of some runs."""
    best = dict.fromkeys(streams, float("inf"))
    for _ in range(REPEATS):
        for run in _run(gguf, threads, context, STEPS, streams, root):
            number = int(run["pl"])
            best[number] = min(best[number], float(run["t_tg"]) / STEPS)
    return best


def _run(
    gguf: Path, threads: int, context: int, new: int, streams: Sequence[int], root: Path
) -> list[dict[str, float]]:
    """One line of results for each number of streams; they share the prompt."""
    argv = [str(batched_bench(LLAMACPP.path(root))), "--model", str(gguf), "-pps", "--output-format", "jsonl"]
    argv += ["--threads", str(threads), "--threads-batch", str(threads)]
    argv += ["-npp", str(context), "-ntg", str(new), "-npl", ",".join(map(str, streams))]
    argv += ["--batch-size", str(BATCH_TOKENS), "--ctx-size", str(max(streams) * (context + new + 32))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != len(streams):
        raise PeerFailed(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return rows
