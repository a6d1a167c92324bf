"""Projections on a CPU: which product is fastest for which weight and batch.

Activations are float32. Four ways to multiply, all but the last exact in their weights:

- plain: float32 weights and BLAS.
- packed: bfloat16 weights in oneDNN's own blocked layout; activations are rounded to bfloat16, sums are
  float32. Fastest from a handful of rows on, where AVX512_BF16 or AMX is there.
- half: float16 weights in fbgemm's layout, float32 activations. Memory-bound products (one to three rows)
  reach the full memory bandwidth, twice what oneDNN reaches. The weights are scaled by a power of two into
  float16's range, and used so only where none of them changes by more than a float32 sum could resolve.
- int4: weights that a checkpoint stores in 4 bits (`cpu_int4`), for few rows; scales are rounded to bfloat16.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.models.cpu_int4 import Int4Linear, int4_linear
from pdserve.models.cpu_native_linear import NativeLinear
from pdserve.models.ops import Workload
from pdserve.models.quantization.integers import IntWeight

FEW_ROWS: Final = 3
"""Up to this many rows the float16 product usually beats oneDNN's bfloat16 one."""
PROBED_ROWS: Final = (1, 2, 3, 4, 6, 8, 16, 64)
PROBES: Final = 12
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
    shape: tuple[int, int]
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI.bfloat16(), self.weight_OI, self.bias_O).float()


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """oneDNN's blocked bfloat16 weight; the original may be dropped."""

    packed: Tensor
    shape: tuple[int, int]
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
    shape: tuple[int, int]
    scale: float
    """The product is multiplied by this power of two: exact."""
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        y: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x_TI, self.packed, None)
        return y.mul_(self.scale) if self.bias_O is None else torch.add(self.bias_O, y, alpha=self.scale)


Many = HalfLinear | Bfloat16Linear | PackedLinear | NativeLinear


class BySize:
    """`few` up to `few_rows` rows, `many` above. Starts with a rule of thumb; `choose_products` measures."""

    def __init__(self, few: HalfLinear | Int4Linear, many: Many) -> None:
        self._few: HalfLinear | Int4Linear | None = few
        self._many: Many | Int4Linear = many
        self._few_rows = FEW_ROWS

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._few is not None and x_TI.shape[0] <= self._few_rows:
            return self._few(x_TI)
        return self._many(x_TI)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        return self._many.shape

    @property
    def form(self) -> str:
        """What `few` is, to measure like with like."""
        return type(self._few).__name__

    @property
    def few_rows(self) -> int:
        return self._few_rows

    def time_few(self, x_TI: Tensor) -> float:
        """Seconds of one product; NaN where only `many` is left."""
        return _seconds(self._few, x_TI) if self._few is not None else math.nan

    def time_many(self, x_TI: Tensor) -> float:
        return _seconds(self._many, x_TI)

    def split_at(self, few_rows: int) -> None:
        """Use `few` up to this many rows, and let go of what is never used."""
        self._few_rows = few_rows
        if few_rows == 0:
            self._few = None
        elif few_rows >= PROBED_ROWS[-1] and self._few is not None:
            self._many, self._few = self._few, None


Linear = PlainLinear | Int4Linear | Bfloat16Linear | PackedLinear | HalfLinear | NativeLinear | BySize


def make_linear(weight_OI: Tensor, bias_O: Tensor | None, workload: Workload) -> Linear:
    """The fastest lossless products for this weight. Copies what it keeps."""
    if weight_OI.dtype != torch.bfloat16:
        plain_bias = None if bias_O is None else bias_O.float()
        return _half(weight_OI, bias_O) or PlainLinear(weight_OI.float().contiguous(), plain_bias)
    many = _packed(weight_OI, bias_O)
    half = _half(weight_OI, bias_O) if workload is Workload.ANY else None
    return many if half is None else BySize(half, many)


def make_head(weight_VE: Tensor) -> Linear:
    """The product for logits: float32 sums that stay float32, the same for every number of rows.

    oneDNN's bfloat16 product rounds its result to 8 bits, which makes ties of logits that differ: greedy
    tokens and draws would then depend on how many rows a step happens to have.
    """
    return _half(weight_VE, None) or make_linear(weight_VE, None, Workload.ANY)


def make_integer_linear(
    weight: IntWeight, bias_O: Tensor | None, dtype: torch.dtype, workload: Workload
) -> Linear:
    """Multiplied out to dtype for many rows; of few rows in 4 bits, where dtype is one of 16 bits."""
    plain_OI = weight.dequantised(dtype)
    few = int4_linear(weight, bias_O) if workload is Workload.ANY and dtype.itemsize == 2 else None
    if few is None:
        return make_linear(plain_OI, bias_O, workload)
    many = make_linear(plain_OI, bias_O, Workload.PREFILL)
    return BySize(few, many) if isinstance(many, Many) else many


def choose_products(linears: Sequence[Linear]) -> None:
    """Measure, for each shape and form of weight, up to how many rows the one for few is the faster.

    Every product is timed over several layers' weights in turn, so that they come from memory as in a step.
    """
    by_shape: dict[tuple[str, tuple[int, int]], list[BySize]] = {}
    for linear in linears:
        if isinstance(linear, BySize):
            by_shape.setdefault((linear.form, linear.shape), []).append(linear)
    for (_, (_, inputs)), alike in by_shape.items():
        few_rows = 0
        for rows in PROBED_ROWS:
            x = torch.randn(rows, inputs)
            probed = [alike[i % len(alike)] for i in range(PROBES)]
            times = [(linear.time_few(x), linear.time_many(x)) for linear in probed]
            if min(few for few, _ in times) > min(many for _, many in times):
                break
            few_rows = rows
        for linear in alike:
            linear.split_at(few_rows)


def _seconds(linear: Many | Int4Linear, x_TI: Tensor) -> float:
    # Time on the CPU: what other processes take meanwhile does not count.
    start = time.thread_time()
    linear(x_TI)
    return time.thread_time() - start


def _half(weight_OI: Tensor, bias_O: Tensor | None) -> HalfLinear | None:
    """None where fbgemm is missing or float16 would change a weight."""
    least, most = torch.aminmax(weight_OI)
    largest = max(-float(least), float(most))
    if largest <= 0.0 or not math.isfinite(largest):
        return None
    exponent = HALF_LARGEST - math.frexp(largest)[1]
    scaled = weight_OI.float() * 2.0**exponent
    # Weights of 16 bits fit by construction: what float16 drops of them is below 2 ** -25.
    if weight_OI.dtype == torch.float32:
        change = (scaled.half().float() - scaled).abs_().max()
        if float(change) > HALF_TOLERANCE * 2.0**HALF_LARGEST:
            return None
    with warnings.catch_warnings():
        # Both functions are marked deprecated in torch 2.13, with no successor as fast; they warn once.
        warnings.simplefilter("ignore")
        try:
            packed = torch.fbgemm_pack_gemm_matrix_fp16(scaled)
            shape = (weight_OI.shape[0], weight_OI.shape[1])
            linear = HalfLinear(packed, shape, 2.0**-exponent, None if bias_O is None else bias_O.float())
            linear(torch.zeros(1, shape[1]))
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
    return linear


def _packed(weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear | Bfloat16Linear:
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), None)
        linear = PackedLinear(packed, shape, bias_O)
        linear(torch.zeros(1, shape[1]))
    except (AttributeError, NotImplementedError, RuntimeError):
        return Bfloat16Linear(weight_OI.contiguous(), shape, bias_O)
    return linear
