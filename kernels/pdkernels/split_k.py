"""A product with few rows has few tiles: its inputs are split over programs, and the parts summed here.

Parts are stored and added in one order, not with atomics: the same inputs give the same bits, and a CUDA
graph may hold both launches.

Shape legend: T rows, O outputs, I inputs, S splits, C outputs of a tile, D inputs per iteration.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from pdkernels._triton import jit, tl
from pdkernels.tuning import LaunchConfig, program_slots
from pdkernels.validate import ceil_div, next_power_of_2

BLOCK: Final = 1024
LEAST_ITERATIONS: Final = 4
"""Of one program: below that, storing and adding its part costs more than it saves."""


@jit
def sum_splits_kernel(
    partial: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    numbers: tl.tensor,
    O: tl.tensor,  # noqa: E741
    splits: tl.tensor,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # grid (ceil(T * O / BLOCK),): numbers of the result that follow each other.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < numbers
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial + at, mask=live, other=0.0)
        partial += numbers
    if BIAS:
        total += tl.load(bias + at % O, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def product_config(rows: int, dtype: torch.dtype) -> LaunchConfig:
    """Tiles of a product with a weight that is unpacked in registers; not measured on a GPU, chosen to
    compile without spills. `block_m` is the rows of x, `block_n` the outputs of a tile."""
    block_m = min(64, max(16, next_power_of_2(rows)))
    if dtype == torch.float32:
        return LaunchConfig(block_m=min(block_m, 32), block_n=64, num_warps=4, num_stages=2)
    if block_m <= 32:
        return LaunchConfig(block_m=block_m, block_n=64, num_warps=4, num_stages=4)
    return LaunchConfig(block_m=block_m, block_n=128, num_warps=8, num_stages=3)


def iterations_per_split(tiles: int, iterations: int, device: torch.device) -> int:
    """How many iterations each program does so that `tiles` output tiles fill the device."""
    wanted = max(1, program_slots(device) // tiles)
    return max(min(iterations, LEAST_ITERATIONS), ceil_div(iterations, wanted))


def sum_splits(partial_STO: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> None:
    """out = sum of the splits (+ bias). partial: contiguous float32; out: contiguous."""
    splits, rows, outputs = partial_STO.shape
    sum_splits_kernel[(ceil_div(rows * outputs, BLOCK),)](
        partial_STO,
        partial_STO if bias_O is None else bias_O,
        out_TO,
        rows * outputs,
        outputs,
        splits,
        BIAS=bias_O is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )
