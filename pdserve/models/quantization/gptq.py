"""GPTQ checkpoints (AutoGPTQ, GPTQModel): integers packed along the inputs, with or without act-order.

Paper: Frantar et al., GPTQ, ICLR 2023. Tensors of a module, p = 32 / bits codes to an int32:

    qweight  int32 [I / p, O]    g_idx   int32 [I]   group of every input; absent where it is i // group_size
    qzeros   int32 [G, O / p]    scales  float [G, O]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.models.quantization.integers import IntWeight, unpack
from pdserve.models.quantization.scheme import StoredTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """See `Scheme`."""

    bits: int
    """2, 4 or 8."""
    group_size: int | None
    """Inputs that share a scale; None is all of them."""
    zeros_less_one: bool
    """The first format stores every zero point minus one; `gptq_v2` stores it as it is."""

    @property
    def name(self) -> str:
        groups = "one group" if self.group_size is None else f"groups of {self.group_size}"
        return f"GPTQ {self.bits} bit, {groups}"

    def holds(self, stored: StoredTensors, module: str) -> bool:
        return f"{module}.qweight" in stored.names

    def shape(self, stored: StoredTensors, module: str) -> tuple[int, int]:
        name = f"{module}.qweight"
        found = stored.shape(name)
        if len(found) != 2 or stored.dtype(name) is not torch.int32:
            raise CheckpointError(
                f"{stored.folder}: {name} must be int32 with 2 dimensions, found {stored.dtype(name)} {found}"
            )
        return found[1], found[0] * 32 // self.bits

    def weight(self, stored: StoredTensors, module: str, dtype: torch.dtype) -> Tensor:
        return self.integers(stored, module).dequantised(dtype)

    def integers(self, stored: StoredTensors, module: str) -> IntWeight:
        """The weight before it is multiplied out. Raises `CheckpointError` as `weight` does."""
        outputs, inputs = self.shape(stored, module)
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        scales = stored.require(f"{module}.scales", (groups, outputs))
        qzeros = stored.require(f"{module}.qzeros", (groups, outputs * self.bits // 32))
        qweight = stored.get(f"{module}.qweight")
        zeros = unpack(qzeros, self.bits)
        if self.zeros_less_one:
            # A zero point of 0 was stored as -1: all bits set.
            zeros = (zeros + 1) & (2**self.bits - 1)
        return IntWeight(
            codes_OI=unpack(qweight.t(), self.bits),
            zeros_GO=zeros,
            scales_GO=scales,
            group_of_I=self._group_of_inputs(stored, module, inputs, groups),
            bits=self.bits,
        )

    def _group_of_inputs(self, stored: StoredTensors, module: str, inputs: int, groups: int) -> Tensor | None:
        """None where every group is a run of group_size neighbours."""
        name = f"{module}.g_idx"
        size = self.group_size or inputs
        runs = torch.arange(inputs) // size
        if name in stored.names and stored.shape(name) != (0,):
            group_of = stored.require(name, (inputs,)).long()
            if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
                raise CheckpointError(
                    f"{stored.folder}: {name} must name groups 0 to {groups - 1}, "
                    f"found {int(group_of.min())} to {int(group_of.max())}"
                )
            if not torch.equal(group_of, runs):
                return group_of
        return runs if inputs % size else None
