"""AWQ checkpoints in the GEMM layout (AutoAWQ): 4-bit integers packed along the outputs, interleaved.

Paper: Lin et al., AWQ, MLSys 2024. Tensors of a module:

    qweight  int32 [I, O / 8]    qzeros  int32 [G, O / 8]    scales  float [G, O]

Of eight neighbouring outputs 0..7, an int32 holds 0 2 4 6 1 3 5 7 from its lowest bits to its highest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.models.quantization.integers import IntWeight, unpack
from pdserve.models.quantization.scheme import StoredTensors

PLACE_OF_OUTPUT: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in the int32 each of eight neighbouring outputs lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """See `Scheme`. Always 4 bits, with zero points as they are."""

    group_size: int | None
    """Inputs that share a scale; None is all of them."""

    @property
    def name(self) -> str:
        groups = "one group" if self.group_size is None else f"groups of {self.group_size}"
        return f"AWQ 4 bit, {groups}"

    def holds(self, stored: StoredTensors, module: str) -> bool:
        return f"{module}.qweight" in stored.names

    def shape(self, stored: StoredTensors, module: str) -> tuple[int, int]:
        name = f"{module}.qweight"
        found = stored.shape(name)
        if len(found) != 2 or stored.dtype(name) is not torch.int32:
            raise CheckpointError(
                f"{stored.folder}: {name} must be int32 with 2 dimensions, found {stored.dtype(name)} {found}"
            )
        return found[1] * 8, found[0]

    def weight(self, stored: StoredTensors, module: str, dtype: torch.dtype) -> Tensor:
        return self.integers(stored, module).dequantised(dtype)

    def integers(self, stored: StoredTensors, module: str) -> IntWeight:
        """The weight before it is multiplied out. Raises `CheckpointError` as `weight` does."""
        outputs, inputs = self.shape(stored, module)
        size = self.group_size or inputs
        if inputs % size:
            raise CheckpointError(
                f"{stored.folder}: {module} has {inputs} inputs, not a multiple of group_size {size}"
            )
        groups = inputs // size
        scales = stored.require(f"{module}.scales", (groups, outputs))
        qzeros = stored.require(f"{module}.qzeros", (groups, outputs // 8))
        qweight = stored.get(f"{module}.qweight")
        return IntWeight(
            codes_OI=_in_order(qweight).t().contiguous(),
            zeros_GO=_in_order(qzeros),
            scales_GO=scales,
            group_of_I=None,
            bits=4,
        )


def _in_order(packed: Tensor) -> Tensor:
    """int32 [N, O / 8] to uint8 [N, O]."""
    interleaved_N8 = unpack(packed, 4).view(-1, 8)
    return interleaved_N8[:, torch.tensor(PLACE_OF_OUTPUT)].view(packed.shape[0], -1)
