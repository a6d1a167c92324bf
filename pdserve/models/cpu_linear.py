"""Projections on a CPU: which product is fastest for which weight and batch, losslessly.

Activations are float32. Three ways to multiply, each exact in its weights:

- plain: float32 weights and BLAS.
- packed: bfloat16 weights in oneDNN's own blocked layout; activations are rounded to bfloat16, sums are
  float32. Fastest from a handful of rows on, where AVX512_BF16 or AMX is there.
- half: float16 weights in fbgemm's layout, float32 activations. Memory-bound products (one to three rows)
  reach the full memory bandwidth, twice what oneDNN reaches. The weights are scaled by a power of two into
  float16's range, and used so only where none of them changes by more than a float32 sum could resolve.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_MAX_ROWS: Final = 3
"""Up to this many rows the float16 product beats oneDNN's bfloat16 one."""
HALF_LARGEST: Final = 15
"""Weights are scaled to below 2 ** this; float16 ends at 2 ** 16."""
HALF_TOLERANCE: Final = 2.0**-32
"""Largest change of a weight, relative to the largest weight; float32 resolves 2 ** -24."""


@dataclass(frozen=True, slots=True)
class PlainLinear:
    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True)
class Bfloat16Linear:
    """bfloat16 weights as they are, for CPUs or shapes that oneDNN does not repack."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI.bfloat16(), self.weight_OI, self.bias_O).float()


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """oneDNN's blocked bfloat16 weight; the original may be dropped."""

    packed: Tensor
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_TI.bfloat16(), self.packed, self.bias_O, "none", [], ""
        )
        return y.float()


@dataclass(frozen=True, slots=True)
class HalfLinear:
    """fbgemm's float16 weight, scaled; float32 activations and sums."""

    packed: Tensor
    scale: float
    """The product is multiplied by this power of two: exact."""
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        y: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x_TI, self.packed, None)
        return y.mul_(self.scale) if self.bias_O is None else torch.add(self.bias_O, y, alpha=self.scale)


@dataclass(frozen=True, slots=True)
class BySize:
    """`few` up to `max_few` rows, `many` above."""

    few: HalfLinear
    many: Bfloat16Linear | PackedLinear
    max_few: int

    def __call__(self, x_TI: Tensor) -> Tensor:
        return (self.few if x_TI.shape[0] <= self.max_few else self.many)(x_TI)


Linear = PlainLinear | Bfloat16Linear | PackedLinear | HalfLinear | BySize


def make_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """The fastest lossless product for this weight. Copies what it keeps."""
    half = _half(weight_OI, bias_O)
    if weight_OI.dtype != torch.bfloat16:
        return half or PlainLinear(weight_OI.float().contiguous(), None if bias_O is None else bias_O.float())
    many = _packed(weight_OI, bias_O)
    return many if half is None else BySize(half, many, HALF_MAX_ROWS)


def _half(weight_OI: Tensor, bias_O: Tensor | None) -> HalfLinear | None:
    """None where fbgemm is missing or float16 would change a weight."""
    weight = weight_OI.float()
    largest = float(weight.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return None
    exponent = HALF_LARGEST - math.frexp(largest)[1]
    scaled = weight * 2.0**exponent
    change = (scaled.half().float() - scaled).abs_().max()
    if float(change) > HALF_TOLERANCE * 2.0**HALF_LARGEST:
        return None
    with warnings.catch_warnings():
        # Both functions are marked deprecated in torch 2.13, with no successor as fast; they warn once.
        warnings.simplefilter("ignore")
        try:
            packed = torch.fbgemm_pack_gemm_matrix_fp16(scaled)
            linear = HalfLinear(packed, 2.0**-exponent, None if bias_O is None else bias_O.float())
            linear(torch.zeros(1, weight.shape[1]))
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
    return linear


def _packed(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear | Bfloat16Linear:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
        linear = PackedLinear(packed, bias_O)
        linear(torch.zeros(1, weight_OI.shape[1]))
    except (AttributeError, NotImplementedError, RuntimeError):
        return Bfloat16Linear(weight_OI.contiguous(), bias_O)
    return linear
