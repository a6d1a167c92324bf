"""Projections of quantised checkpoints on a GPU, which stay as small as they are stored.

What the kernels do not take is answered with None, and multiplied out at load by the caller: 8-bit integers,
groups that 16 does not divide, a last group that is smaller, FP8 blocks whose width 16 does not divide.

Shape legend: T tokens of the step, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pdkernels.fp8_matmul import Fp8Matrix, fp8_depth, fp8_matmul
from pdkernels.w4a16 import W4Weight, pack_w4, w4_half, w4_matmul
from torch import Tensor

from pdserve.models.quantization.fp8 import Fp8Weight
from pdserve.models.quantization.integers import IntWeight


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """See `Linear`."""

    weight: W4Weight
    bias_O: Tensor | None
    order_I: Tensor | None
    """int64; where act-order scattered the groups: the inputs in order of their groups, as the weight has
    them."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self.order_I is not None:
            x_TI = x_TI.index_select(-1, self.order_I)
        return w4_matmul(x_TI, self.weight, self.bias_O)


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """See `Linear`."""

    weight: Fp8Matrix
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return fp8_matmul(x_TI, self.weight, self.bias_O)


def int4_linear(weight: IntWeight, bias_O: Tensor | None, device: torch.device) -> Int4Linear | None:
    """bias_O: on the device, in the activations' dtype. None: not a weight for the kernel."""
    inputs, groups = weight.codes_OI.shape[1], weight.scales_GO.shape[0]
    if weight.bits > 4 or w4_half(inputs, groups) is None:
        return None
    codes_OI, order_I = weight.codes_OI.to(device), None
    if weight.group_of_I is not None:
        sizes_G = torch.bincount(weight.group_of_I, minlength=groups)
        if not bool((sizes_G == inputs // groups).all()):
            return None
        order_I = torch.argsort(weight.group_of_I, stable=True).to(device)
        codes_OI = codes_OI.index_select(1, order_I)
    packed = pack_w4(codes_OI, weight.zeros_GO.to(device), weight.scales_GO.to(device))
    return Int4Linear(packed, bias_O, order_I)


def fp8_linear(weight: Fp8Weight, bias_O: Tensor | None, device: torch.device) -> Fp8Linear | None:
    """As `int4_linear`."""
    if fp8_depth(weight.wide, weight.codes_OI.shape[1]) is None:
        return None
    matrix = Fp8Matrix(
        # As bytes: torch copies no FP8 tensors on every device.
        codes_OI=weight.codes_OI.view(torch.uint8).to(device).contiguous().view(torch.float8_e4m3fn),
        scales_RK=weight.scales_RC.to(device).contiguous(),
        tall=weight.tall,
        wide=weight.wide,
    )
    return Fp8Linear(matrix, bias_O)
