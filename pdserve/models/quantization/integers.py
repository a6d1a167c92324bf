"""Weights stored as small unsigned integers in groups: what GPTQ and AWQ have in common.

Shape legend: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

CHUNK_NUMBERS: Final = 2**22
"""Weights in float32 at a time: 16 MiB, whatever the size of the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntWeight:
    """weight[o, i] = (codes[o, i] - zeros[g, o]) * scales[g, o], where g is the group of input i."""

    codes_OI: Tensor
    """uint8."""
    zeros_GO: Tensor
    """uint8."""
    scales_GO: Tensor
    """Floating point, as stored."""
    group_of_I: Tensor | None
    """int64; None where groups are runs of I / G neighbours."""
    bits: int
    """Codes and zero points are below 2 ** bits."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[O, I], computed in float32 and rounded once."""
        outputs, inputs = self.codes_OI.shape
        out = torch.empty(outputs, inputs, dtype=dtype)
        rows = max(1, CHUNK_NUMBERS // inputs)
        for first in range(0, outputs, rows):
            part = slice(first, first + rows)
            zeros_CG = self.zeros_GO[:, part].t().float()
            scales_CG = self.scales_GO[:, part].t().float()
            codes_CI = self.codes_OI[part].float()
            if self.group_of_I is None:
                codes = codes_CI.view(codes_CI.shape[0], zeros_CG.shape[1], -1)
                codes.sub_(zeros_CG.unsqueeze(-1)).mul_(scales_CG.unsqueeze(-1))
            else:
                codes_CI.sub_(zeros_CG[:, self.group_of_I]).mul_(scales_CG[:, self.group_of_I])
            out[part] = codes_CI
        return out


def stacked(parts: Sequence[IntWeight]) -> IntWeight | None:
    """One weight of several, along the outputs; None where their groups of inputs differ."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.bits != first.bits or not _same_groups(part, first) for part in parts):
        return None
    if any(part.scales_GO.shape[0] != first.scales_GO.shape[0] for part in parts):
        return None
    return IntWeight(
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        zeros_GO=torch.cat([part.zeros_GO for part in parts], dim=1),
        scales_GO=torch.cat([part.scales_GO for part in parts], dim=1),
        group_of_I=first.group_of_I,
        bits=first.bits,
    )


def _same_groups(one: IntWeight, other: IntWeight) -> bool:
    if one.group_of_I is None or other.group_of_I is None:
        return one.group_of_I is other.group_of_I
    return torch.equal(one.group_of_I, other.group_of_I)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes in an int32 tensor, lowest bits first: [..., n] becomes uint8 [..., n * 32 / bits].

    bits is 2, 4 or 8. Little-endian hosts only, as every one that torch is built for here.
    """
    as_bytes = packed.reshape(-1).view(torch.uint8).view(*packed.shape[:-1], -1)
    if bits == 8:
        return as_bytes
    mask = 2**bits - 1
    parts = [(as_bytes >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)
