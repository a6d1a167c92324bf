"""Rotary embedding, the optional norm per head before it, and the write into KV blocks: one pass.

    q [T, H, D] ──(norm)──rotate──> out [T, H, D]
    k [T, K, D] ──(norm)──rotate──> pool[block, layer, 0, :, slot, :]     slot_T = block * B + token in block
    v [T, K, D] ───────────────────> pool[block, layer, 1, :, slot, :]

Shape legend: T tokens, H query heads, K kv heads, D head_dim, N blocks, L layers, B tokens of a block,
P positions of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkernels._triton import jit, jit_for_any, tl
from pdkernels.fp8 import to_e4m3
from pdkernels.paged import fp8_mode, require_cache, stored
from pdkernels.validate import (
    ceil_div,
    next_power_of_2,
    require,
    require_float,
    require_int32,
    require_like,
    require_pool,
    require_rows,
    require_shape,
)


@jit
def _norm_halves(
    lo_HR: tl.tensor,
    hi_HR: tl.tensor,
    weight: tl.tensor,
    r_R: tl.tensor,
    live_R: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    HALF: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMSNorm of heads held as two halves; rounds where the unfused ops would."""
    scale_H = 1.0 / tl.sqrt((tl.sum(lo_HR * lo_HR, axis=1) + tl.sum(hi_HR * hi_HR, axis=1)) / D + eps)
    w_lo_R = tl.load(weight + r_R, mask=live_R, other=0.0).to(tl.float32)
    w_hi_R = tl.load(weight + HALF + r_R, mask=live_R, other=0.0).to(tl.float32)
    lo_HR = (lo_HR * scale_H[:, None]).to(dtype).to(tl.float32) * w_lo_R[None, :]
    hi_HR = (hi_HR * scale_H[:, None]).to(dtype).to(tl.float32) * w_hi_R[None, :]
    return lo_HR.to(dtype).to(tl.float32), hi_HR.to(dtype).to(tl.float32)


@jit
def _cache_number(x: tl.tensor, scale: tl.tensor, dtype: tl.constexpr, FP8: tl.constexpr) -> tl.tensor:
    """x as the pool holds it."""
    return to_e4m3(x.to(tl.float32) / scale) if FP8 else x.to(dtype)


@jit_for_any("layer")
def rope_and_write_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    pool: tl.tensor,
    cos_sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    eps: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    layer: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_t: tl.tensor,
    v_stride_h: tl.tensor,
    pool_stride_n: tl.tensor,
    pool_stride_l: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    QK_NORM: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    # grid (T, ceil(H / BLOCK_H) + ceil(K / BLOCK_H)): query heads first, then kv heads.
    HALF: tl.constexpr = D // 2
    Q_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    r_R = tl.arange(0, BLOCK_R)
    live_R = r_R < HALF
    table = cos_sin + tl.load(positions + token).to(tl.int64) * D
    cos_R = tl.load(table + r_R, mask=live_R, other=0.0)[None, :]
    sin_R = tl.load(table + HALF + r_R, mask=live_R, other=0.0)[None, :]
    dtype = out.dtype.element_ty
    if tile < Q_TILES:
        h_H = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        at_HR = h_H[:, None] * q_stride_h + r_R[None, :]
        live_HR = (h_H < H)[:, None] & live_R[None, :]
        row = q + token * q_stride_t
        lo_HR = tl.load(row + at_HR, mask=live_HR, other=0.0).to(tl.float32)
        hi_HR = tl.load(row + HALF + at_HR, mask=live_HR, other=0.0).to(tl.float32)
        if QK_NORM:
            lo_HR, hi_HR = _norm_halves(lo_HR, hi_HR, q_weight, r_R, live_R, eps, D, HALF, dtype)
        to_HR = token * H * D + h_H[:, None] * D + r_R[None, :]
        tl.store(out + to_HR, (lo_HR * cos_R - hi_HR * sin_R).to(dtype), mask=live_HR)
        tl.store(out + HALF + to_HR, (hi_HR * cos_R + lo_HR * sin_R).to(dtype), mask=live_HR)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        # A negative slot is a padding row of a captured graph: it has no place in the pool.
        if slot >= 0:
            h_H = (tile - Q_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
            live_HR = (h_H < K)[:, None] & live_R[None, :]
            at_HR = h_H[:, None] * k_stride_h + r_R[None, :]
            row = k + token * k_stride_t
            lo_HR = tl.load(row + at_HR, mask=live_HR, other=0.0).to(tl.float32)
            hi_HR = tl.load(row + HALF + at_HR, mask=live_HR, other=0.0).to(tl.float32)
            if QK_NORM:
                lo_HR, hi_HR = _norm_halves(lo_HR, hi_HR, k_weight, r_R, live_R, eps, D, HALF, dtype)
            to = pool + (slot // B) * pool_stride_n + layer * pool_stride_l + (slot % B) * D
            to_HR = h_H[:, None] * (B * D) + r_R[None, :]
            cache = pool.dtype.element_ty
            tl.store(
                to + to_HR, _cache_number(lo_HR * cos_R - hi_HR * sin_R, k_scale, cache, FP8), mask=live_HR
            )
            tl.store(
                to + HALF + to_HR,
                _cache_number(hi_HR * cos_R + lo_HR * sin_R, k_scale, cache, FP8),
                mask=live_HR,
            )
            at_HR = h_H[:, None] * v_stride_h + r_R[None, :]
            row = v + token * v_stride_t
            v_lo_HR = tl.load(row + at_HR, mask=live_HR, other=0.0)
            v_hi_HR = tl.load(row + HALF + at_HR, mask=live_HR, other=0.0)
            to += K * B * D
            tl.store(to + to_HR, _cache_number(v_lo_HR, v_scale, cache, FP8), mask=live_HR)
            tl.store(to + HALF + to_HR, _cache_number(v_hi_HR, v_scale, cache, FP8), mask=live_HR)


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Weights of the norm per head before the rotation (Qwen3): both [D], of q's dtype."""

    q_weight_D: Tensor
    k_weight_D: Tensor
    eps: float


def _validate(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pool: Tensor, layer: int, cos_sin_PD: Tensor
) -> tuple[int, int, int, int]:
    op = "rope_and_write"
    require_float(op, "q", q_THD)
    require_pool(op, pool, layer)
    t = q_THD.shape[0]
    kv_heads, d = pool.shape[3], pool.shape[5]
    require_shape(op, "q", q_THD, (None, None, d))
    require_shape(op, "k", k_TKD, (t, kv_heads, d))
    require_shape(op, "v", v_TKD, (t, kv_heads, d))
    require(d % 2 == 0, op, "head_dim", wanted="even", found=d)
    num_slots = pool.shape[0] * pool.shape[4]
    require(num_slots < 2**31, op, "pool", wanted="of under 2^31 token slots", found=num_slots)
    require_cache(op, pool, q_THD)
    for name, tensor in (("k", k_TKD), ("v", v_TKD)):
        require_like(op, name, tensor, q_THD)
    for name, tensor in (("q", q_THD), ("k", k_TKD), ("v", v_TKD)):
        require_rows(op, name, tensor)
    require_shape(op, "cos_sin", cos_sin_PD, (None, d))
    fits = cos_sin_PD.dtype == torch.float32 and cos_sin_PD.is_contiguous()
    require(fits, op, "cos_sin", wanted="contiguous float32", found=cos_sin_PD.dtype)
    return t, q_THD.shape[1], kv_heads, d


def _validate_norm(op: str, norm: QKNorm, q_THD: Tensor) -> None:
    for name, weight_D in (("q_weight", norm.q_weight_D), ("k_weight", norm.k_weight_D)):
        require_shape(op, name, weight_D, q_THD.shape[2:])
        require_like(op, name, weight_D, q_THD)


def rope_and_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    pool: Tensor,
    layer: int,
    *,
    cos_sin_PD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    qk_norm: QKNorm | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Rotate q and k, write k and v into the pool.

    The rotation is RoPE (Su et al. 2021) with half-split pairs, dimension i with i + D/2, as Hugging Face's
    Llama has it.

    q_THD, k_TKD, v_TKD: one dtype, dense last dimension, other strides free (slices of a fused projection).
    pool: [N, L, 2, K, B, D] of that dtype or float8_e4m3fn, contiguous. kv_scales: keys and values are
    divided by these before they are written to an FP8 pool, and are 448 of them at most.
    cos_sin_PD: fp32, row p is cos (D/2) then sin (D/2) of
    position p. positions_T: int32 in [0, P). slots_T: int32, block * B + token within the block, each used
    once; a negative one marks a padding row, which writes nothing to the pool.
    Returns a new contiguous [T, H, D]. Raises `KernelInputError` (values of index tensors are not checked).
    """
    op = "rope_and_write"
    t, heads, kv_heads, d = _validate(q_THD, k_TKD, v_TKD, pool, layer, cos_sin_PD)
    require_int32(op, "positions", positions_T, (t,))
    require_int32(op, "slots", slots_T, (t,))
    if qk_norm is not None:
        _validate_norm(op, qk_norm, q_THD)
    out_THD = torch.empty((t, heads, d), dtype=q_THD.dtype, device=q_THD.device)
    if t == 0:
        return out_THD
    block_h = min(8, next_power_of_2(max(heads, kv_heads)))
    rope_and_write_kernel[(t, ceil_div(heads, block_h) + ceil_div(kv_heads, block_h))](
        q_THD,
        k_TKD,
        v_TKD,
        out_THD,
        stored(pool),
        cos_sin_PD,
        positions_T,
        slots_T,
        q_THD if qk_norm is None else qk_norm.q_weight_D,
        k_TKD if qk_norm is None else qk_norm.k_weight_D,
        0.0 if qk_norm is None else qk_norm.eps,
        *kv_scales,
        layer,
        *q_THD.stride()[:2],
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
        *pool.stride()[:2],
        H=heads,
        K=kv_heads,
        D=d,
        B=pool.shape[4],
        BLOCK_H=block_h,
        BLOCK_R=next_power_of_2(d // 2),
        QK_NORM=qk_norm is not None,
        FP8=fp8_mode(pool) > 0,
        num_warps=4 if block_h * d >= 1024 else 1,
    )
    return out_THD
