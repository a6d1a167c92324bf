"""SwiGLU's elementwise half: silu(gate) * up of a fused gate/up projection.

Shape legend: T tokens, F the width of the MLP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdkernels._triton import jit, tl
from pdkernels.validate import ceil_div, require, require_float, require_rows

BLOCK_F = 1024


@jit
def silu_mul_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    F: tl.tensor,
    stride: tl.tensor,
    BLOCK_F: tl.constexpr,
) -> None:
    # grid (T, ceil(F / BLOCK_F)).
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live_F = f_F < F
    gate_F = tl.load(gate_up + row * stride + f_F, mask=live_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_up + row * stride + F + f_F, mask=live_F, other=0.0).to(tl.float32)
    silu_F = (gate_F / (1.0 + tl.exp(-gate_F))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * F + f_F, (silu_F * up_F).to(out.dtype.element_ty), mask=live_F)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] (Shazeer 2020, "GLU variants"); fp32 inside, silu rounded to the dtype.

    gate_up_T2F: [T, 2F], dense rows. Returns a new contiguous [T, F]. Raises `KernelInputError`.
    """
    op = "silu_mul"
    even = gate_up_T2F.dim() == 2 and gate_up_T2F.shape[1] % 2 == 0
    require(even, op, "gate_up", wanted="[T, 2F]", found=list(gate_up_T2F.shape))
    require_float(op, "gate_up", gate_up_T2F)
    require_rows(op, "gate_up", gate_up_T2F)
    t, f = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = torch.empty((t, f), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    if t == 0 or f == 0:
        return out_TF
    silu_mul_kernel[(t, ceil_div(f, BLOCK_F))](
        gate_up_T2F, out_TF, f, gate_up_T2F.stride(0), BLOCK_F=BLOCK_F, num_warps=4
    )
    return out_TF
