"""4-bit weights kept as they are stored, for products of few rows on a CPU.

torch's own kernel reads half a byte per weight where the others read two, in bfloat16: activations, scales
and `(8 - zero) * scale` are rounded to it, sums are float32. In other types it is many times slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pdserve.models.quantization.integers import IntWeight

GROUP_SIZES: Final = (32, 64, 128, 256)
OUTPUTS_MULTIPLE: Final = 16
_INNER_TILES: Final = 8  # of the CUDA layout; the CPU's packing asks for one and looks at none


@dataclass(frozen=True, slots=True)
class Int4Linear:
    packed: Tensor
    """As `_convert_weight_to_int4pack_for_cpu` lays it out."""
    scales_zeros_GO2: Tensor
    """bfloat16; weight = (code - 8) * scale + zero."""
    group_size: int
    shape: tuple[int, int]
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TI.bfloat16(), self.packed, self.group_size, self.scales_zeros_GO2
        )
        return y.float() if self.bias_O is None else y.float().add_(self.bias_O)


def int4_linear(weight: IntWeight, bias_O: Tensor | None) -> Int4Linear | None:
    """None where the weight has other bits, groups that are no runs, or sizes the kernel does not take."""
    outputs, inputs = weight.codes_OI.shape
    group_size = inputs // weight.scales_GO.shape[0]
    if weight.bits != 4 or weight.group_of_I is not None or group_size not in GROUP_SIZES:
        return None
    if outputs % OUTPUTS_MULTIPLE:
        return None
    scales_GO = weight.scales_GO.float()
    scales_zeros_GO2 = torch.stack([scales_GO, (8.0 - weight.zeros_GO.float()) * scales_GO], dim=-1)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes_OI.int(), _INNER_TILES)
        bias = None if bias_O is None else bias_O.float()
        linear = Int4Linear(packed, scales_zeros_GO2.bfloat16(), group_size, (outputs, inputs), bias)
        linear(torch.zeros(1, inputs))
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return linear
