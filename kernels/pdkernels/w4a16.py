"""x @ weight.T with a weight of 4-bit codes in groups (AWQ, GPTQ), unpacked in registers.

    weight[o, i] = (code[o, i] - zero[g, o]) * scale[g, o]        g = i // group

The product of an iteration is that of whole numbers (exact in every dtype of x), and is scaled in float32: no
weight is rounded. Of 2 HALF neighbouring inputs, a byte holds input j in its low bits and j + HALF in its
high ones, so that both halves are plain tiles; a tile's bytes follow each other in memory:

    packed [J, O, HALF]    J = ceil(I / (2 HALF))

The weight is the left operand (it comes from registers), x the right one.

Shape legend: T rows, O outputs, I inputs, G groups, J iterations, H = HALF, C outputs of a tile, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pdkernels._triton import jit, jit_for_any, tl
from pdkernels.split_k import iterations_per_split, product_config, sum_splits
from pdkernels.validate import (
    ceil_div,
    require,
    require_float,
    require_like,
    require_rows,
    require_shape,
)

HALVES: Final = (64, 32, 16)
"""Inputs of half an iteration; the largest that divides the group is taken."""


@jit
def _codes_times_x(
    codes_CH: tl.tensor,
    x: tl.tensor,
    at_T: tl.tensor,
    live_T: tl.tensor,
    i_H: tl.tensor,
    I: tl.tensor,  # noqa: E741
    zeros: tl.tensor,
    at_C: tl.tensor,
    acc_CT: tl.tensor,
    ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """acc + (codes - zero) @ x of these inputs. at_C: places of this group's zero points."""
    if ZERO >= 0:  # noqa: SIM108  decided when the kernel is compiled
        codes_CH = codes_CH - ZERO
    else:
        codes_CH = codes_CH - tl.load(zeros + at_C).to(tl.int8)[:, None]
    x_HT = tl.load(x + at_T[None, :] + i_H[:, None], mask=live_T[None, :] & (i_H < I)[:, None], other=0.0)
    return tl.dot(codes_CH.to(x_HT.dtype), x_HT, acc_CT, input_precision=PRECISION)


@jit_for_any("T")
def w4_matmul_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    zeros: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    G: tl.tensor,
    stride_x: tl.tensor,
    iterations: tl.tensor,
    per_split: tl.tensor,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # grid (ceil(O / C), ceil(T / BLOCK_T), S): neighbours read the same rows of x.
    o_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_T = t_T < T
    split = tl.program_id(2)
    h_H = tl.arange(0, HALF)
    # Outputs past the end read the last one's weights: what comes of them is never stored.
    from_C = tl.minimum(o_C, O - 1)
    at_T = t_T.to(tl.int64) * stride_x
    acc_CT = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    none_CT = tl.zeros((BLOCK_C, BLOCK_T), dtype=tl.float32)
    first = split * per_split
    tile = packed + first.to(tl.int64) * O * HALF
    for step in range(first, tl.minimum(first + per_split, iterations)):
        byte_CH = tl.load(tile + from_C[:, None] * HALF + h_H[None, :])
        tile += O * HALF
        low_CH = (byte_CH & 15).to(tl.int8)
        high_CH = (byte_CH >> 4).to(tl.int8)
        i_H = step * (2 * HALF) + h_H
        # The padding behind the last input may begin a group that is not there; x is zero for it.
        at_C = tl.minimum(step * (2 * HALF) // GROUP, G - 1) * O + from_C
        part_CT = _codes_times_x(
            low_CH, x, at_T, live_T, i_H, I, zeros, at_C, none_CT, ZERO, PRECISION
        )  # fmt: skip
        if GROUP % (2 * HALF) == 0:
            part_CT = _codes_times_x(
                high_CH, x, at_T, live_T, i_H + HALF, I, zeros, at_C, part_CT, ZERO, PRECISION
            )  # fmt: skip
            acc_CT += part_CT * tl.load(scales + at_C).to(tl.float32)[:, None]
        else:
            acc_CT += part_CT * tl.load(scales + at_C).to(tl.float32)[:, None]
            at_C = tl.minimum((step * (2 * HALF) + HALF) // GROUP, G - 1) * O + from_C
            part_CT = _codes_times_x(
                high_CH, x, at_T, live_T, i_H + HALF, I, zeros, at_C, none_CT, ZERO, PRECISION
            )  # fmt: skip
            acc_CT += part_CT * tl.load(scales + at_C).to(tl.float32)[:, None]
    if BIAS:
        acc_CT += tl.load(bias + from_C).to(tl.float32)[:, None]
    at_CT = (split.to(tl.int64) * T + t_T)[None, :] * O + o_C[:, None]
    tl.store(out + at_CT, acc_CT.to(out.dtype.element_ty), mask=live_T[None, :] & (o_C < O)[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class W4Weight:
    """A weight [O, I] as `pack_w4` made it; tensors are contiguous and on one device."""

    packed_JOH: Tensor
    """uint8."""
    zeros_GO: Tensor | None
    """uint8; None where all are `zero`."""
    zero: int
    scales_GO: Tensor
    """Floating point, as stored."""
    inputs: int
    group: int

    @property
    def outputs(self) -> int:
        return self.packed_JOH.shape[1]


def w4_half(inputs: int, groups: int) -> int | None:
    """Inputs of half an iteration; None where runs of inputs / groups cannot be cut into such."""
    if groups < 1 or inputs % groups:
        return None
    return next((half for half in HALVES if (inputs // groups) % half == 0), None)


def pack_w4(codes_OI: Tensor, zeros_GO: Tensor, scales_GO: Tensor) -> W4Weight:
    """From plain codes, on the device they are on.

    codes_OI, zeros_GO: uint8 below 16; groups are runs of I / G inputs. Raises `KernelInputError` for a group
    that 16 does not divide, and for tensors that do not fit together (codes are not looked at).
    """
    op = "pack_w4"
    require_shape(op, "codes", codes_OI, (None, None))
    require(codes_OI.dtype == torch.uint8, op, "codes", wanted="uint8", found=codes_OI.dtype)
    outputs, inputs = codes_OI.shape
    require_shape(op, "scales", scales_GO, (None, outputs))
    require_float(op, "scales", scales_GO)
    require_shape(op, "zeros", zeros_GO, scales_GO.shape)
    require(zeros_GO.dtype == torch.uint8, op, "zeros", wanted="uint8", found=zeros_GO.dtype)
    groups = scales_GO.shape[0]
    half = w4_half(inputs, groups)
    if half is None:
        wanted = "runs of neighbours in multiples of 16"
        require(False, op, "groups", wanted=wanted, found=f"{groups} of {inputs}")
        raise AssertionError
    steps = ceil_div(inputs, 2 * half)
    padded_OI = torch.nn.functional.pad(codes_OI, (0, steps * 2 * half - inputs))
    low_high_OJ2H = padded_OI.view(outputs, steps, 2, half)
    packed_OJH = low_high_OJ2H[:, :, 0] | (low_high_OJ2H[:, :, 1] << 4)
    first = int(zeros_GO.flatten()[0]) if zeros_GO.numel() else 0
    same = bool((zeros_GO == first).all())
    return W4Weight(
        packed_JOH=packed_OJH.transpose(0, 1).contiguous(),
        zeros_GO=None if same else zeros_GO.contiguous(),
        zero=first,
        scales_GO=scales_GO.contiguous(),
        inputs=inputs,
        group=inputs // groups,
    )


def w4_matmul(x_TI: Tensor, weight: W4Weight, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, summed in float32; returns a new [T, O] like x.

    x_TI: dense rows. bias_O: contiguous, like x. One launch, or two where the inputs are split; no
    synchronisation. Raises `KernelInputError`.
    """
    op = "w4_matmul"
    require_shape(op, "x", x_TI, (None, weight.inputs))
    require_float(op, "x", x_TI)
    require_rows(op, "x", x_TI)
    require(
        weight.packed_JOH.device == x_TI.device,
        op, "weight", wanted=f"on {x_TI.device}", found=weight.packed_JOH.device,
    )  # fmt: skip
    outputs, rows = weight.outputs, x_TI.shape[0]
    if bias_O is not None:
        require_shape(op, "bias", bias_O, (outputs,))
        require_like(op, "bias", bias_O, x_TI)
    out_TO = torch.empty((rows, outputs), dtype=x_TI.dtype, device=x_TI.device)
    if rows == 0 or outputs == 0:
        return out_TO
    config = product_config(rows, x_TI.dtype)
    steps, half = weight.packed_JOH.shape[0], weight.packed_JOH.shape[2]
    tiles = ceil_div(outputs, config.block_n), ceil_div(rows, config.block_m)
    per_split = iterations_per_split(tiles[0] * tiles[1], steps, x_TI.device)
    splits = ceil_div(steps, per_split)
    target = out_TO
    if splits > 1:
        target = torch.empty((splits, rows, outputs), dtype=torch.float32, device=x_TI.device)
    w4_matmul_kernel[(*tiles, splits)](
        x_TI,
        weight.packed_JOH,
        weight.packed_JOH if weight.zeros_GO is None else weight.zeros_GO,
        weight.scales_GO,
        x_TI if bias_O is None else bias_O,
        target,
        rows,
        outputs,
        weight.inputs,
        weight.scales_GO.shape[0],
        x_TI.stride(0),
        steps,
        per_split,
        GROUP=weight.group,
        ZERO=-1 if weight.zeros_GO is not None else weight.zero,
        BIAS=bias_O is not None and splits == 1,
        BLOCK_T=config.block_m,
        BLOCK_C=config.block_n,
        HALF=half,
        PRECISION="ieee" if x_TI.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        sum_splits(target, bias_O, out_TO)
    return out_TO
