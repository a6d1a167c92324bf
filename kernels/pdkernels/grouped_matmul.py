"""Matrix products of a mixture of experts: every row with the weight of its own expert, in one launch.

Rows are sorted by expert; each expert's run of rows is cut into tiles of M. The plan of the tiles is made on
the device, with shapes that depend on the number of rows alone: no synchronisation, and a CUDA graph may
hold it. Tiles past the last one do nothing.

Shape legend: R rows of x, N products (a row of x with one expert), I inputs, O outputs, X experts, L tiles,
M rows of a tile, C outputs of a tile, D inputs per iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkernels._triton import jit, jit_for_any, tl
from pdkernels.tuning import LaunchConfig
from pdkernels.validate import (
    ceil_div,
    require,
    require_float,
    require_int32,
    require_like,
    require_rows,
    require_shape,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTiles:
    """Products sorted by expert, in tiles. All tensors are int32, on the device."""

    order_N: Tensor
    """Products in order of their experts."""
    expert_L: Tensor
    """X where the tile is past the last one."""
    first_L: Tensor
    """First place in `order_N` of each tile."""
    end_L: Tensor
    """Last place of the tile's expert, exclusive."""
    block_m: int


@jit
def _tile(
    x: tl.tensor,
    weight: tl.tensor,
    row_M: tl.tensor,
    live_M: tl.tensor,
    o_C: tl.tensor,
    stride_x: tl.tensor,
    I: tl.tensor,  # noqa: E741
    O: tl.tensor,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """fp32 [M, C]: rows of x by the rows `o_C` of one expert's weight."""
    acc_MC = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    x_M = x + row_M.to(tl.int64) * stride_x
    # Outputs past the end read the last one's weights: what comes of them is never stored.
    weight_C = weight + tl.minimum(o_C, O - 1).to(tl.int64) * I
    d_D = tl.arange(0, BLOCK_D)
    for first in range(0, I, BLOCK_D):
        live_D = first + d_D < I
        x_MD = tl.load(
            x_M[:, None] + (first + d_D)[None, :], mask=live_M[:, None] & live_D[None, :], other=0.0
        )
        weight_DC = tl.load(weight_C[None, :] + (first + d_D)[:, None], mask=live_D[:, None], other=0.0)
        acc_MC = tl.dot(x_MD, weight_DC, acc_MC, input_precision=PRECISION)
    return acc_MC


@jit_for_any("num_rows")
def grouped_matmul_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    expert_of_tile: tl.tensor,
    first_of_tile: tl.tensor,
    end_of_tile: tl.tensor,
    num_rows: tl.tensor,
    stride_x: tl.tensor,
    I: tl.tensor,  # noqa: E741
    O: tl.tensor,  # noqa: E741
    X: tl.tensor,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # grid (ceil(O / C), L): neighbours read the same rows of x and other rows of the same weight.
    tile = tl.program_id(1)
    expert = tl.load(expert_of_tile + tile)
    if expert < X:
        n_M = tl.load(first_of_tile + tile) + tl.arange(0, BLOCK_M)
        live_M = n_M < tl.load(end_of_tile + tile)
        product_M = tl.load(order + n_M, mask=live_M, other=0)
        o_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        acc_MC = _tile(
            x, weight + expert.to(tl.int64) * O * I, product_M // SHARE, live_M, o_C, stride_x, I, O,
            BLOCK_M, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
        at_MC = product_M.to(tl.int64)[:, None] * O + o_C[None, :]
        tl.store(out + at_MC, acc_MC.to(out.dtype.element_ty), mask=live_M[:, None] & (o_C < O)[None, :])


def plan_experts(expert_N: Tensor, num_experts: int, dtype: torch.dtype) -> ExpertTiles:
    """Sort products by expert and cut them into tiles, on the device.

    expert_N: int64, each in [0, num_experts). dtype: of the products to come, which sets the tile.
    """
    op = "plan_experts"
    require(expert_N.dtype == torch.int64, op, "expert", wanted="int64", found=expert_N.dtype)
    require_shape(op, "expert", expert_N, (None,))
    n, device = expert_N.shape[0], expert_N.device
    block_m = launch_config(n, num_experts, dtype).block_m
    order_N = torch.argsort(expert_N, stable=True)
    counts_X = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts_X.scatter_add_(0, expert_N, torch.ones_like(expert_N))
    end_X = counts_X.cumsum(0)
    tiles_X = (counts_X + block_m - 1) // block_m
    last_tile_X = tiles_X.cumsum(0)
    # Every expert with rows has at most one tile that is not full.
    tile_L = torch.arange(n // block_m + min(n, num_experts), device=device)
    expert_L = torch.searchsorted(last_tile_X, tile_L, right=True)
    known_L = expert_L.clamp(max=num_experts - 1)
    tile_of_expert_L = tile_L - (last_tile_X - tiles_X)[known_L]
    return ExpertTiles(
        order_N=order_N.int(),
        expert_L=expert_L.int(),
        first_L=((end_X - counts_X)[known_L] + tile_of_expert_L * block_m).int(),
        end_L=end_X[known_L].int(),
        block_m=block_m,
    )


def grouped_matmul(x_RI: Tensor, weight_XOI: Tensor, tiles: ExpertTiles) -> Tensor:
    """out[n] = x[n // (N / R)] @ weight[expert of n].T; fp32 sums, returns a new [N, O] like x.

    x_RI: dense rows; N is a multiple of R (a row's products are neighbours). weight_XOI: contiguous, one
    dtype and device with x. Raises `KernelInputError`.
    """
    op = "grouped_matmul"
    require_shape(op, "x", x_RI, (None, None))
    require_float(op, "x", x_RI)
    require_rows(op, "x", x_RI)
    rows, inputs = x_RI.shape
    require_shape(op, "weight", weight_XOI, (None, None, inputs))
    require_like(op, "weight", weight_XOI, x_RI)
    require(weight_XOI.is_contiguous(), op, "weight", wanted="contiguous", found=weight_XOI.stride())
    n, num_tiles = tiles.order_N.shape[0], tiles.expert_L.shape[0]
    require_int32(op, "order", tiles.order_N, (n,))
    for name, tensor in (("expert", tiles.expert_L), ("first", tiles.first_L), ("end", tiles.end_L)):
        require_int32(op, name, tensor, (num_tiles,))
    fits = n == 0 if rows == 0 else n % rows == 0
    require(fits, op, "order", wanted=f"of a multiple of {rows} products", found=n)
    experts, outputs = weight_XOI.shape[0], weight_XOI.shape[1]
    out_NO = torch.empty((n, outputs), dtype=x_RI.dtype, device=x_RI.device)
    if n == 0 or outputs == 0:
        return out_NO
    config = launch_config(n, experts, x_RI.dtype)
    require(tiles.block_m == config.block_m, op, "tiles", wanted=f"of {config.block_m}", found=tiles.block_m)
    grouped_matmul_kernel[(ceil_div(outputs, config.block_n), num_tiles)](
        x_RI,
        weight_XOI,
        out_NO,
        tiles.order_N,
        tiles.expert_L,
        tiles.first_L,
        tiles.end_L,
        n,
        x_RI.stride(0),
        inputs,
        outputs,
        experts,
        SHARE=n // rows,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_n,
        BLOCK_D=32 if x_RI.dtype == torch.float32 else 64,
        PRECISION="ieee" if x_RI.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out_NO


def launch_config(products: int, num_experts: int, dtype: torch.dtype) -> LaunchConfig:
    """Tall tiles where experts have many rows; not measured on a GPU, chosen to compile without spills.

    `block_n` is the outputs of a tile.
    """
    if dtype == torch.float32:
        return LaunchConfig(block_m=16, block_n=64, num_warps=4, num_stages=2)
    if products <= 32 * num_experts:
        return LaunchConfig(block_m=16, block_n=128, num_warps=4, num_stages=4)
    if products <= 128 * num_experts:
        return LaunchConfig(block_m=64, block_n=128, num_warps=4, num_stages=3)
    return LaunchConfig(block_m=128, block_n=128, num_warps=8, num_stages=3)
