"""The CPU kernels one by one, beside torch and the machine's floors: `python -m benchmarks.kernels`.

Weights of several layers are multiplied in turn, so that they come from memory as in a step. torch's products
are those that pdserve falls back to: oneDNN's with repacked weights, and fbgemm's float16 for few rows. Its
attention is `scaled_dot_product_attention` over keys and values that lie contiguous, not in blocks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from pdcpu.library import HelperCore, Library, load

from benchmarks.floors import Floors, Row, Work, best_of, measure_floors, write
from benchmarks.shapes import SHAPES, Shape
from pdserve.core.ids import BlockId
from pdserve.models.config import ModelConfig, RopeConfig
from pdserve.models.cpu_linear import HalfLinear, PackedLinear, make_linear
from pdserve.models.cpu_native import NativeOps
from pdserve.models.cpu_native_linear import Arena, NativeLinear
from pdserve.models.ops import SliceMeta, Workload

TURNS: Final = 5
CPU: Final = torch.device("cpu")
ROWS: Final = (1, 4, 16, 64, 512)
FEW_ROWS: Final = 4
CYCLED_BYTES: Final = 2**27
"""Of weights that are multiplied in turn: more than a last-level cache holds."""
BLOCK: Final = 64

Timed = tuple[str, float, float, dict[str, float]]
"""Case, bytes, operations, seconds by whom."""


def linear_rows(shape: Shape, library: Library, turns: int) -> Iterator[Timed]:
    """Every projection, for several numbers of rows."""
    arena = Arena()
    for name, (outputs, inputs) in shape.linears.items():
        copies = max(1, CYCLED_BYTES // (2 * outputs * inputs))
        weights = [(torch.randn(outputs, inputs) * 0.02).bfloat16() for _ in range(copies)]
        native = [NativeLinear(library, arena, weight, None) for weight in weights]
        packed = [make_linear(weight, None, Workload.PREFILL) for weight in weights]
        half = [make_linear(weight.float(), None, Workload.ANY) for weight in weights]
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            works = {"pdcpu": _each(native, x)}
            if isinstance(packed[0], PackedLinear):
                works["torch, oneDNN"] = _each(packed, x)
            if rows <= FEW_ROWS and isinstance(half[0], HalfLinear):
                works["torch, fbgemm float16"] = _each(half, x)
            seconds = {by: total / copies for by, total in best_of(works, turns, CPU).items()}
            num_bytes = 2 * outputs * inputs + 4 * rows * (outputs + inputs)
            yield f"{shape.name} {name}, {rows} rows", num_bytes, 2 * rows * outputs * inputs, seconds


def _each(linears: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> Work:
    def work() -> None:
        for linear in linears:
            linear(x)

    return work


def attention_rows(shape: Shape, library: Library, turns: int) -> Iterator[Timed]:
    """One layer's attention: new tokens of some sequences over what is in the pool."""
    for sequences, context, new in ((16, 160, 1), (16, 1024, 1), (1, 4096, 1), (1, 0, 512), (1, 0, 2048)):
        length = context + new
        per_row = -(-length // BLOCK)
        layers = max(1, min(8, CYCLED_BYTES // (4 * sequences * length * shape.kv_heads * shape.head_dim)))
        ops = NativeOps(_config(shape, layers), CPU, length, Workload.ANY, library)
        pool = torch.randn(
            (sequences * per_row, layers, 2, shape.kv_heads, BLOCK, shape.head_dim), dtype=torch.bfloat16
        )
        ops.bind_pool(pool)
        metas = [
            SliceMeta(
                offset=row * new,
                length=new,
                start=context,
                blocks=[BlockId(row * per_row + i) for i in range(per_row)],
            )
            for row in range(sequences)
        ]
        plan = ops.plan(metas)
        q = torch.randn(sequences * new, shape.heads, shape.head_dim).bfloat16()
        kv = torch.randn(layers, 2, sequences, shape.kv_heads, length, shape.head_dim).bfloat16()
        q_apart = q.view(sequences, new, shape.heads, shape.head_dim).transpose(1, 2)
        works = {"pdcpu": _ours(ops, q, plan, layers), "torch, SDPA": _theirs(q_apart, kv, causal=new > 1)}
        seconds = {by: total / layers for by, total in best_of(works, turns, CPU).items()}
        num_bytes = 4 * sequences * (length * shape.kv_heads + new * shape.heads) * shape.head_dim
        pairs = sequences * (new * context + new * (new + 1) // 2)
        case = f"{shape.name} attention, {sequences} x {new} new over {context}"
        yield case, num_bytes, 4 * shape.heads * shape.head_dim * pairs, seconds


def _ours(ops: NativeOps, q_THD: torch.Tensor, plan: object, layers: int) -> Work:
    def work() -> None:
        for layer in range(layers):
            ops.attention(q_THD, layer, plan)

    return work


def _theirs(q: torch.Tensor, kv: torch.Tensor, *, causal: bool) -> Work:
    def work() -> None:
        for keys, values in kv:
            F.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True)

    return work


def _config(shape: Shape, layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ff,
        num_layers=layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        max_position=8192,
        tie_word_embeddings=shape.tied,
    )


def measure(shape: Shape, threads: int, floors: Floors, library: Library, turns: int) -> Iterator[Row]:
    for cases in (linear_rows(shape, library, turns), attention_rows(shape, library, turns)):
        for case, num_bytes, flops, seconds in cases:
            for by, taken in seconds.items():
                yield Row(
                    case=case,
                    by=by,
                    threads=threads,
                    num_bytes=num_bytes,
                    flops=flops,
                    seconds=taken,
                    floor_s=floors.seconds(num_bytes, flops),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default="135M,1B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--threads", default=f"1,{len(os.sched_getaffinity(0))}")
    parser.add_argument("--turns", type=int, default=TURNS, help="of which the best counts")
    parser.add_argument("--out", type=Path, default=Path("out/kernels"), help="without a suffix")
    options = parser.parse_args()
    library, floors, rows = load(), {}, []
    counts = sorted({int(count) for count in options.threads.split(",")})
    for threads, name in itertools.product(counts, options.shapes.split(",")):
        torch.set_num_threads(threads)
        library.set_helpers([HelperCore(None)] * (threads - 1))
        if threads not in floors:
            floors[threads] = measure_floors(CPU)
        for row in measure(SHAPES[name], threads, floors[threads], library, options.turns):
            print(row.line, file=sys.stderr)
            rows.append(row)
    command = shlex.join([".venv/bin/python", "-m", "benchmarks.kernels", *sys.argv[1:]])
    print(write(options.out, "The CPU kernels", command, floors, rows))


if __name__ == "__main__":
    main()
