"""SwiGLU's elementwise half in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return silu(gate.float()).to(gate.dtype) * up
