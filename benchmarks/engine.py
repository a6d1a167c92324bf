"""Steps of the engine alone beside transformers and the machine's floors: `python -m benchmarks.engine`.

Random weights in bfloat16, one process, no server. A step of pdserve is one `ModelRunner.forward`: prompts
through the paged pool, logits of the last rows. A step of transformers is one forward of the same shape with
its own cache, attention by `scaled_dot_product_attention`. llama.cpp, where it is set up
(`python -m benchmarks.peers setup llamacpp`), measures itself before them: benchmarks/llamacpp_steps.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.environment import REPO
from benchmarks.floors import Floors, Row, best_of, measure_floors, write
from benchmarks.llamacpp_steps import PeerFailed, llamacpp_checkpoint, prompt_seconds, step_seconds
from benchmarks.peers import LLAMACPP
from benchmarks.processes import ServerDied
from benchmarks.shapes import SHAPES, Shape
from pdserve.core.config import CacheSettings, ModelSettings
from pdserve.core.ids import BlockId
from pdserve.engine.batch import SequenceSlice
from pdserve.engine.build import Engine, build_engine
from pdserve.models import cpu

TURNS: Final = 6


@dataclass(frozen=True, slots=True)
class Case:
    """`rows` sequences; each has `context` tokens in its cache and computes `new` more."""

    name: str
    rows: int
    context: int
    new: int

    def num_bytes(self, shape: Shape) -> float:
        """Weights once, the cache that is read and what is written to it."""
        weights = 2 * (shape.layers * shape.layer_weights + shape.head_weights)
        return weights + self.rows * (self.context + self.new) * shape.kv_bytes_per_token

    def flops(self, shape: Shape) -> float:
        pairs = self.new * self.context + self.new * (self.new + 1) // 2
        weights = self.new * shape.layers * shape.layer_weights + shape.head_weights
        return self.rows * (2 * weights + shape.attention_flops(pairs))


CASES: Final = (
    Case("prompt of 512", 1, 0, 512),
    Case("1 stream at 160", 1, 160, 1),
    Case("1 stream at 4096", 1, 4096, 1),
    Case("4 streams at 160", 4, 160, 1),
    Case("16 streams at 160", 16, 160, 1),
)
SHORT_CONTEXT: Final = 160
BLOCKS: Final = 128


def engine_of(shape: Shape, device: torch.device, *, native: bool) -> Engine:
    """native: with the kernels of pdcpu; else plain torch (CPU alone)."""
    kept = cpu.native_library
    if not native:
        cpu.native_library = lambda say: None
    try:
        with tempfile.TemporaryDirectory() as folder:
            shape.write_config(Path(folder))
            return build_engine(
                Path(folder),
                ModelSettings(load_format="dummy"),
                CacheSettings(num_blocks=BLOCKS),
                device=str(device),
                num_threads=None,
            )
    finally:
        cpu.native_library = kept


def our_step(engine: Engine, case: Case) -> Callable[[], object]:
    size = engine.block_tokens
    per_row = -(-(case.context + case.new) // size)
    slices = [
        SequenceSlice(
            tokens=[5 + i % 1000 for i in range(case.new)],
            start=case.context,
            blocks=[BlockId(row * per_row + i) for i in range(per_row)],
        )
        for row in range(case.rows)
    ]
    return lambda: engine.runner.forward(slices)


def transformers_model(shape: Shape, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        shape.write_config(Path(folder))
        config = LlamaConfig.from_pretrained(folder)
    torch.set_default_dtype(torch.bfloat16)
    try:
        make: Any = LlamaForCausalLM._from_config
        return make(config, attn_implementation="sdpa").to(device).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def their_step(model: Any, case: Case, device: torch.device) -> Callable[[], object]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = torch.full((case.rows, case.new), 5, device=device)
    with torch.inference_mode():
        if case.context:
            read = torch.full((case.rows, case.context), 5, device=device)
            model(read, past_key_values=cache, logits_to_keep=1)

    @torch.inference_mode()
    def step() -> object:
        if behind := cache.get_seq_length() - case.context:  # of the turn before
            cache.crop(-behind)
        return model(tokens, past_key_values=cache, logits_to_keep=1)

    return step


def llamacpp_seconds(shape: Shape, threads: int) -> dict[Case, float]:
    """Empty where llama.cpp is not set up, or fails.

    Contexts of thousands of tokens are left out: it would read them anew for every turn.
    """
    if shape.name not in SHAPES or not LLAMACPP.is_ready(REPO):
        return {}
    try:
        gguf = llamacpp_checkpoint(shape)
        decoded = [case for case in CASES if case.new == 1 and case.context == SHORT_CONTEXT]
        steps = step_seconds(gguf, SHORT_CONTEXT, sorted({case.rows for case in decoded}), threads)
        found = {case: steps[case.rows] for case in decoded}
        found |= {case: prompt_seconds(gguf, case.new, threads) for case in CASES if case.new > 1}
    except (PeerFailed, ServerDied, OSError) as error:
        print(f"llama.cpp is left out: {error}", file=sys.stderr)
        return {}
    return found


def measure(
    shape: Shape, threads: int, floors: Floors, device: torch.device, *, peers: bool, turns: int
) -> Iterator[Row]:
    """Rows of every case; torch's number of threads is set already."""
    engines = {"pdserve": engine_of(shape, device, native=True)}
    if device.type == "cpu":
        engines["pdserve, torch alone"] = engine_of(shape, device, native=False)
    model = transformers_model(shape, device) if peers else None
    theirs = llamacpp_seconds(shape, threads) if peers and device.type == "cpu" else {}
    for case in CASES:
        works = {name: our_step(engine, case) for name, engine in engines.items()}
        if model is not None:
            works["transformers"] = their_step(model, case, device)
        num_bytes, flops = case.num_bytes(shape), case.flops(shape)
        taken = best_of(works, turns, device)
        if case in theirs:
            taken["llama.cpp"] = theirs[case]
        for by, seconds in taken.items():
            yield Row(
                case=f"{shape.name}, {case.name}",
                by=by,
                threads=threads,
                num_bytes=num_bytes,
                flops=flops,
                seconds=seconds,
                floor_s=floors.seconds(num_bytes, flops),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="135M,1B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}", help="of a CPU")
    parser.add_argument("--turns", type=int, default=TURNS, help="of which the best counts")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers and llama.cpp out")
    parser.add_argument("--out", type=Path, default=Path("out/engine"), help="without a suffix")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = sorted({int(count) for count in options.threads.split(",")}) if device.type == "cpu" else [1]
    floors, rows = {}, []
    for threads in counts:
        torch.set_num_threads(threads)
        floors[threads] = measure_floors(device)
        for name in options.shapes.split(","):
            shape, peers, turns = SHAPES[name], not options.no_peers, options.turns
            for row in measure(shape, threads, floors[threads], device, peers=peers, turns=turns):
                print(row.line, file=sys.stderr)
                rows.append(row)
    command = shlex.join([".venv/bin/python", "-m", "benchmarks.engine", *sys.argv[1:]])
    print(write(options.out, "The engine alone", command, floors, rows))


if __name__ == "__main__":
    main()
