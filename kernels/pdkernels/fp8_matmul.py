"""x @ weight.T with a weight of FP8 (e4m3fn) numbers, made wider in registers; activations stay as they are.

A scale belongs to a rectangle of the weight: all of it, one output, or a block (128x128 in DeepSeek-V3). The
product of an iteration is that of the stored numbers (exact in x's dtype), and is scaled in float32.
The weight is the left operand (it comes from registers), x the right one.

Shape legend: T rows, O outputs, I inputs, R x K scales, C outputs of a tile, D inputs per
iteration, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pdkernels._triton import jit_for_any, tl
from pdkernels.fp8 import from_e4m3
from pdkernels.split_k import iterations_per_split, product_config, sum_splits
from pdkernels.tuning import has_fp8
from pdkernels.validate import (
    ceil_div,
    require,
    require_float,
    require_like,
    require_rows,
    require_shape,
)

DEPTHS: Final = (128, 64, 32, 16)
"""Inputs of an iteration; the largest that divides a block of scales is taken."""


@jit_for_any("T")
def fp8_matmul_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    stride_x: tl.tensor,
    tall: tl.tensor,
    wide: tl.tensor,
    columns: tl.tensor,
    iterations: tl.tensor,
    per_split: tl.tensor,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # grid (ceil(O / C), ceil(T / BLOCK_T), S): neighbours read the same rows of x.
    o_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_T = t_T < T
    split = tl.program_id(2)
    d_D = tl.arange(0, BLOCK_D)
    # Outputs past the end read the last one's weights: what comes of them is never stored.
    from_C = tl.minimum(o_C, O - 1)
    weight_C = weight + from_C.to(tl.int64) * I
    scale_C = scales + from_C // tall * columns
    x_T = x + t_T.to(tl.int64) * stride_x
    acc_CT = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    none_CT = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    first = split * per_split
    for step in range(first, tl.minimum(first + per_split, iterations)):
        i_D = step * BLOCK_D + d_D
        live_D = i_D < I
        byte_CD = tl.load(weight_C[:, None] + i_D[None, :], mask=live_D[None, :], other=0)
        x_DT = tl.load(x_T[None, :] + i_D[:, None], mask=live_T[None, :] & live_D[:, None], other=0.0)
        w_CD = from_e4m3(byte_CD, x_DT.dtype, NATIVE)
        if BLOCKS:
            part_CT = tl.dot(w_CD, x_DT, none_CT, input_precision=PRECISION)
            acc_CT += part_CT * tl.load(scale_C + step * BLOCK_D // wide)[:, None]
        else:
            acc_CT = tl.dot(w_CD, x_DT, acc_CT, input_precision=PRECISION)
    if not BLOCKS:
        acc_CT *= tl.load(scale_C)[:, None]
    if BIAS:
        acc_CT += tl.load(bias + from_C).to(tl.float32)[:, None]
    at_CT = (split.to(tl.int64) * T + t_T)[None, :] * O + o_C[:, None]
    tl.store(out + at_CT, acc_CT.to(out.dtype.element_ty), mask=live_T[None, :] & (o_C < O)[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Matrix:
    """weight[o, i] = codes[o, i] * scales[o // tall, i // wide]; contiguous, on one device."""

    codes_OI: Tensor
    """float8_e4m3fn."""
    scales_RK: Tensor
    """float32 [ceil(O / tall), ceil(I / wide)]."""
    tall: int
    wide: int


def fp8_depth(wide: int, inputs: int) -> int | None:
    """Inputs of an iteration; None where a block of scales cannot be cut into such."""
    if wide >= inputs:
        return DEPTHS[0]
    return next((depth for depth in DEPTHS if wide % depth == 0), None)


def _validate(x_TI: Tensor, weight: Fp8Matrix, bias_O: Tensor | None) -> None:
    op = "fp8_matmul"
    require_shape(op, "weight", weight.codes_OI, (None, None))
    outputs, inputs = weight.codes_OI.shape
    e4m3 = torch.float8_e4m3fn
    require(weight.codes_OI.dtype == e4m3, op, "weight", wanted=str(e4m3), found=weight.codes_OI.dtype)
    require(weight.codes_OI.is_contiguous(), op, "weight", wanted="contiguous", found="strided")
    require_shape(op, "x", x_TI, (None, inputs))
    require_float(op, "x", x_TI)
    require_rows(op, "x", x_TI)
    shape = (ceil_div(outputs, weight.tall), ceil_div(inputs, weight.wide))
    require_shape(op, "scales", weight.scales_RK, shape)
    fits = weight.scales_RK.dtype == torch.float32 and weight.scales_RK.is_contiguous()
    require(fits, op, "scales", wanted="contiguous float32", found=weight.scales_RK.dtype)
    for name, tensor in (("weight", weight.codes_OI), ("scales", weight.scales_RK)):
        require(tensor.device == x_TI.device, op, name, wanted=f"on {x_TI.device}", found=tensor.device)
    if bias_O is not None:
        require_shape(op, "bias", bias_O, (outputs,))
        require_like(op, "bias", bias_O, x_TI)


def fp8_matmul(x_TI: Tensor, weight: Fp8Matrix, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, summed in float32; returns a new [T, O] like x.

    x_TI: dense rows. bias_O: contiguous, like x. One launch, or two where the inputs are split; no
    synchronisation. Raises `KernelInputError`, also for blocks whose width 16 does not divide.
    """
    op = "fp8_matmul"
    _validate(x_TI, weight, bias_O)
    rows, inputs = x_TI.shape
    outputs = weight.codes_OI.shape[0]
    depth = fp8_depth(weight.wide, inputs)
    if depth is None:
        require(False, op, "blocks", wanted="of inputs in multiples of 16", found=weight.wide)
        raise AssertionError
    out_TO = torch.empty((rows, outputs), dtype=x_TI.dtype, device=x_TI.device)
    if rows == 0 or outputs == 0:
        return out_TO
    config = product_config(rows, x_TI.dtype)
    depth = min(depth, 128 if config.block_m <= 32 and x_TI.dtype != torch.float32 else 64)
    steps = ceil_div(inputs, depth)
    tiles = ceil_div(outputs, config.block_n), ceil_div(rows, config.block_m)
    per_split = iterations_per_split(tiles[0] * tiles[1], steps, x_TI.device)
    splits = ceil_div(steps, per_split)
    target = out_TO
    if splits > 1:
        target = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x_TI.device)
    fp8_matmul_kernel[(*tiles, splits)](
        x_TI,
        weight.codes_OI.view(torch.uint8),
        weight.scales_RK,
        x_TI if bias_O is None else bias_O,
        target,
        rows,
        outputs,
        inputs,
        x_TI.stride(0),
        weight.tall,
        weight.wide,
        weight.scales_RK.shape[1],
        steps,
        per_split,
        BLOCKS=weight.scales_RK.shape[1] > 1,
        BIAS=bias_O is not None and splits == 1,
        NATIVE=has_fp8(x_TI.device),
        BLOCK_T=config.block_m,
        BLOCK_C=config.block_n,
        BLOCK_D=depth,
        PRECISION="ieee" if x_TI.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        sum_splits(target, bias_O, out_TO)
    return out_TO
