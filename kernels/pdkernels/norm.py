"""RMSNorm over the last dimension, plain and fused with the residual addition.

Shape legend: T tokens, H heads, E the normalised dimension (hidden, or head_dim for a norm per head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdkernels._triton import jit, jit_for_any, tl
from pdkernels.validate import (
    ceil_div,
    next_power_of_2,
    require,
    require_float,
    require_like,
    require_rows,
    require_shape,
)

MAX_E = 32768
"""A row is held in registers by one program."""


@jit_for_any("num_rows")
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    heads: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    # grid (ceil(T*H / BLOCK_R),): BLOCK_R rows each; row r is token r // heads, head r % heads.
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    e_E = tl.arange(0, BLOCK_E)
    live_RE = (row_R < num_rows)[:, None] & (e_E < E)[None, :]
    token_R = (row_R // heads).to(tl.int64)
    from_R = token_R * stride_t + (row_R % heads) * stride_h
    x_RE = tl.load(x + from_R[:, None] + e_E[None, :], mask=live_RE, other=0.0).to(tl.float32)
    w_E = tl.load(weight + e_E, mask=e_E < E, other=0.0).to(tl.float32)
    scale_R = 1.0 / tl.sqrt(tl.sum(x_RE * x_RE, axis=1) / E + eps)
    # Rounded before the weight is applied, as the reference models do it.
    normed_RE = (x_RE * scale_R[:, None]).to(out.dtype.element_ty).to(tl.float32)
    y_RE = normed_RE * w_E[None, :]
    to_R = row_R.to(tl.int64) * E
    tl.store(out + to_R[:, None] + e_E[None, :], y_RE.to(out.dtype.element_ty), mask=live_RE)


@jit
def add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    # grid (T,): one token each.
    row = tl.program_id(0).to(tl.int64)
    e_E = tl.arange(0, BLOCK_E)
    live_E = e_E < E
    x_E = tl.load(x + row * x_stride + e_E, mask=live_E, other=0.0).to(tl.float32)
    r_E = tl.load(residual + row * residual_stride + e_E, mask=live_E, other=0.0).to(tl.float32)
    # The norm sees the sum as stored, so that the fused op equals the two ops one after the other.
    sum_E = (x_E + r_E).to(out.dtype.element_ty)
    tl.store(residual + row * residual_stride + e_E, sum_E, mask=live_E)
    s_E = sum_E.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s_E * s_E, axis=0) / E + eps)
    w_E = tl.load(weight + e_E, mask=live_E, other=0.0).to(tl.float32)
    normed_E = (s_E * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * E + e_E, (normed_E * w_E).to(out.dtype.element_ty), mask=live_E)


def _warps(block_e: int) -> int:
    return min(16, max(1, block_e // 512))


def _validate(op: str, x: Tensor, weight_E: Tensor) -> int:
    require_float(op, "x", x)
    require_rows(op, "x", x)
    e = x.shape[-1]
    require(1 <= e <= MAX_E, op, "x", wanted=f"of last dimension 1 to {MAX_E}", found=e)
    require_shape(op, "weight", weight_E, (e,))
    require_like(op, "weight", weight_E, x)
    require(weight_E.is_contiguous(), op, "weight", wanted="contiguous", found=weight_E.stride())
    return e


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang & Sennrich 2019), computed in fp32.

    x: [T, E], or [T, H, E] for a norm per head; any strides but a dense last dimension. weight_E: x's dtype.
    Returns a new contiguous tensor of x's shape and dtype. Raises `KernelInputError`.
    """
    op = "rms_norm"
    require(x.dim() in (2, 3), op, "x", wanted="[T, E] or [T, H, E]", found=list(x.shape))
    e = _validate(op, x, weight_E)
    heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * heads
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    block_e = next_power_of_2(e)
    block_r = max(1, min(16, 1024 // block_e))
    rms_norm_kernel[(ceil_div(num_rows, block_r),)](
        x,
        weight_E,
        out,
        num_rows,
        heads,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        eps,
        E=e,
        BLOCK_E=block_e,
        BLOCK_R=block_r,
        num_warps=_warps(block_e * block_r),
    )
    return out


def add_rms_norm(x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`residual += x` in place, then `rms_norm(residual)`, in one pass over memory.

    x_TE, residual_TE: [T, E] of one dtype, dense rows, not overlapping. Returns a new contiguous [T, E].
    Raises `KernelInputError`.
    """
    op = "add_rms_norm"
    require(x_TE.dim() == 2, op, "x", wanted="[T, E]", found=list(x_TE.shape))
    e = _validate(op, x_TE, weight_E)
    require_shape(op, "residual", residual_TE, x_TE.shape)
    require_like(op, "residual", residual_TE, x_TE)
    require_rows(op, "residual", residual_TE)
    out_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
    if x_TE.shape[0] == 0:
        return out_TE
    block_e = next_power_of_2(e)
    add_rms_norm_kernel[(x_TE.shape[0],)](
        x_TE,
        residual_TE,
        weight_E,
        out_TE,
        x_TE.stride(0),
        residual_TE.stride(0),
        eps,
        E=e,
        BLOCK_E=block_e,
        num_warps=_warps(block_e),
    )
    return out_TE
