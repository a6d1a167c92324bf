"""Attention of one new token per sequence over its KV blocks (paged decode).

The query heads of one kv head form the rows of a matrix product, so K and V are read once for all of them.
The KV range is split over programs by `pdkernels.plan.plan_decode`; partial results are joined by their
log-sum-exp (Dao et al. 2023, "Flash-Decoding").

Shape legend: S sequences, T rows of the step, H query heads, K kv heads, G = H / K, D head_dim, N blocks,
L layers, B tokens of a block, C items of the plan, M rows of a tile (G padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkernels._triton import jit, jit_for_any, tl
from pdkernels.paged import cached, fp8_mode, kv_offsets, require_cache, scaled_scores, stored
from pdkernels.tuning import attention_config, device_config
from pdkernels.validate import (
    next_power_of_2,
    require,
    require_float,
    require_int32,
    require_like,
    require_pool,
    require_rows,
    require_shape,
)


@jit_for_any("layer", "table_stride")
def decode_kernel(
    q: tl.tensor,
    pool: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    tables: tl.tensor,
    context: tl.tensor,
    rows: tl.tensor,
    item_seq: tl.tensor,
    item_begin: tl.tensor,
    item_end: tl.tensor,
    item_slot: tl.tensor,
    first_slot: tl.tensor,
    layer: tl.tensor,
    scale: tl.tensor,
    v_scale: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    pool_stride_n: tl.tensor,
    pool_stride_l: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
) -> None:
    # grid (C, K): one item of the plan and one kv head each.
    G: tl.constexpr = H // K
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.load(item_seq + item)
    if seq < 0:
        return
    begin = tl.load(item_begin + item)
    end = tl.load(item_end + item)
    row = tl.load(rows + seq).to(tl.int64)
    m_M = tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    head_M = kv_head * G + m_M
    live_MD = (m_M < G)[:, None] & (d_D < D)[None, :]
    q_MD = tl.load(q + row * q_stride + head_M[:, None] * D + d_D[None, :], mask=live_MD, other=0.0)
    # The oldest token the query may look at; smaller ones share its tile.
    floor = 0
    if WINDOW > 0:
        floor = tl.load(context + seq) - WINDOW
    table = tables + seq.to(tl.int64) * table_stride
    k_pool = pool + layer * pool_stride_l + kv_head * (B * D)
    v_pool = k_pool + K * B * D
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(begin, end, BLOCK_N):
        n_N = n + tl.arange(0, BLOCK_N)
        live_N = n_N < end
        at_N = kv_offsets(table, n, end, pool_stride_n, B, D, BLOCK_N)
        k_DN = tl.load(
            k_pool + at_N[None, :] + d_D[:, None], mask=live_N[None, :] & (d_D < D)[:, None], other=0.0
        )
        k_DN = cached(k_DN, q_MD.dtype, FP8)
        s_MN = scaled_scores(tl.dot(q_MD, k_DN, input_precision=PRECISION), scale, SOFT_CAP)
        if WINDOW > 0:
            s_MN = tl.where((live_N & (n_N >= floor))[None, :], s_MN, float("-inf"))
        else:
            s_MN = tl.where(live_N[None, :], s_MN, float("-inf"))
        v_ND = tl.load(
            v_pool + at_N[:, None] + d_D[None, :], mask=live_N[:, None] & (d_D < D)[None, :], other=0.0
        )
        v_ND = cached(v_ND, q_MD.dtype, FP8)
        new_max_M = tl.maximum(max_M, tl.max(s_MN, axis=1))
        p_MN = tl.exp2(s_MN - new_max_M[:, None])
        shrink_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, axis=1)
        acc_MD = acc_MD * shrink_M[:, None]
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
        max_M = new_max_M
    acc_MD = acc_MD * (v_scale / sum_M)[:, None] if FP8 > 0 else acc_MD / sum_M[:, None]
    slots = tl.load(first_slot + seq + 1) - tl.load(first_slot + seq)
    if slots == 1:
        to_MD = row * (H * D) + head_M[:, None] * D + d_D[None, :]
        tl.store(out + to_MD, acc_MD.to(out.dtype.element_ty), mask=live_MD)
    else:
        slot = tl.load(item_slot + item).to(tl.int64)
        to_MD = slot * (H * D) + head_M[:, None] * D + d_D[None, :]
        tl.store(partial + to_MD, acc_MD, mask=live_MD)
        tl.store(lse + slot * H + head_M, max_M + tl.log2(sum_M), mask=m_M < G)


@jit
def reduce_kernel(
    partial: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    first_slot: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    # grid (S, H): one query head of one sequence each; sequences with one slot are complete already.
    seq = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(first_slot + seq)
    last = tl.load(first_slot + seq + 1)
    if last - first <= 1:
        return
    d_D = tl.arange(0, BLOCK_D)
    top = float("-inf")
    total = 0.0
    acc_D = tl.zeros([BLOCK_D], tl.float32)
    for slot in range(first, last, BLOCK_C):
        slot_C = slot + tl.arange(0, BLOCK_C)
        live_C = slot_C < last
        lse_C = tl.load(lse + slot_C.to(tl.int64) * H + head, mask=live_C, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse_C, axis=0))
        weight_C = tl.exp2(lse_C - new_top)
        at_CD = (slot_C.to(tl.int64) * H + head)[:, None] * D + d_D[None, :]
        part_CD = tl.load(partial + at_CD, mask=live_C[:, None] & (d_D < D)[None, :], other=0.0)
        shrink = tl.exp2(top - new_top)
        acc_D = acc_D * shrink + tl.sum(part_CD * weight_C[:, None], axis=0)
        total = total * shrink + tl.sum(weight_C, axis=0)
        top = new_top
    row = tl.load(rows + seq).to(tl.int64)
    tl.store(out + (row * H + head) * D + d_D, (acc_D / total).to(out.dtype.element_ty), mask=d_D < D)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """The step's plan on the device, all int32 and contiguous: `plan.DecodeItems` and the batch itself."""

    rows_S: Tensor
    """Row of each sequence's new token among the T rows of q and out."""
    context_S: Tensor
    """Tokens in the sequence, the new one included (its KV is in the pool); 0 for a padding row."""
    tables_SM: Tensor
    """Block tables, [S, max blocks]; entries past a sequence's blocks are not read."""
    seq_C: Tensor
    begin_C: Tensor
    end_C: Tensor
    slot_C: Tensor
    first_slot_S1: Tensor


def _validate(q_THD: Tensor, pool: Tensor, layer: int, work: DecodeWork, out_THD: Tensor) -> None:
    op = "decode_attention"
    require_float(op, "q", q_THD)
    require_pool(op, pool, layer)
    require_cache(op, pool, q_THD)
    require_shape(op, "q", q_THD, (None, None, pool.shape[5]))
    require_rows(op, "q", q_THD)
    dense = q_THD.stride(1) == q_THD.shape[2]
    require(dense, op, "q", wanted="dense in its last two dimensions", found=q_THD.stride())
    heads, kv_heads = q_THD.shape[1], pool.shape[3]
    require(heads % kv_heads == 0, op, "q", wanted=f"of heads in multiples of {kv_heads}", found=heads)
    require_shape(op, "out", out_THD, q_THD.shape)
    require_like(op, "out", out_THD, q_THD)
    require(out_THD.is_contiguous(), op, "out", wanted="contiguous", found=out_THD.stride())
    s, c = work.context_S.shape[0], work.seq_C.shape[0]
    for name, size in (("rows_S", s), ("context_S", s), ("first_slot_S1", s + 1)):
        require_int32(op, name, getattr(work, name), (size,))
    for name in ("seq_C", "begin_C", "end_C", "slot_C"):
        require_int32(op, name, getattr(work, name), (c,))
    require_int32(op, "tables_SM", work.tables_SM, (s, None))


def decode_tile(pool: Tensor, dtype: torch.dtype | None = None) -> int:
    """KV tokens per iteration for this pool: the `tile` the plan must be cut by. dtype: of the queries, where
    it is not the pool's."""
    config = attention_config(
        device_config(pool.device).decode,
        (dtype or pool.dtype).itemsize,
        next_power_of_2(max(16, pool.shape[5])),
    )
    return config.block_n


def decode_attention(
    q_THD: Tensor,
    pool: Tensor,
    layer: int,
    work: DecodeWork,
    out_THD: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """softmax(cap(q k^T * scale)) v of one token per sequence; writes rows `rows_S` of out_THD only.

    q_THD: rotated queries, dense in heads and head_dim. pool: [N, L, 2, K, B, D] of q's dtype or
    float8_e4m3fn, holding the new token's KV too. kv_scales: what numbers of an FP8 pool's keys and values
    are multiplied by. window: the query sees the last `window` tokens, itself included. The plan must come
    from `plan_decode` with `decode_tile(pool, q.dtype)` and the same window. Two launches, no
    synchronisation, grids fixed by S and C: safe to capture. Raises `KernelInputError`.
    """
    _validate(q_THD, pool, layer, work, out_THD)
    heads, d = q_THD.shape[1:]
    _, _, _, kv_heads, block_tokens, _ = pool.shape
    s, c = work.context_S.shape[0], work.seq_C.shape[0]
    if s == 0:
        return
    block_d = next_power_of_2(max(16, d))
    config = attention_config(device_config(pool.device).decode, q_THD.element_size(), block_d)
    fp8 = fp8_mode(pool)
    partial_CHD = torch.empty((c, heads, d), dtype=torch.float32, device=pool.device)
    lse_CH = torch.empty((c, heads), dtype=torch.float32, device=pool.device)
    decode_kernel[(c, kv_heads)](
        q_THD,
        stored(pool),
        out_THD,
        partial_CHD,
        lse_CH,
        work.tables_SM,
        work.context_S,
        work.rows_S,
        work.seq_C,
        work.begin_C,
        work.end_C,
        work.slot_C,
        work.first_slot_S1,
        layer,
        scale * kv_scales[0] if fp8 else scale,
        kv_scales[1],
        q_THD.stride(0),
        work.tables_SM.stride(0),
        *pool.stride()[:2],
        H=heads,
        K=kv_heads,
        D=d,
        B=block_tokens,
        WINDOW=window or 0,
        SOFT_CAP=soft_cap or 0.0,
        BLOCK_M=max(config.block_m, next_power_of_2(heads // kv_heads)),
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        FP8=fp8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if c > s:
        _reduce(partial_CHD, lse_CH, work, out_THD, block_d)


def _reduce(partial_CHD: Tensor, lse_CH: Tensor, work: DecodeWork, out_THD: Tensor, block_d: int) -> None:
    """What the chunks of a split context found, together."""
    heads, d = out_THD.shape[1:]
    reduce_kernel[(work.context_S.shape[0], heads)](
        partial_CHD,
        lse_CH,
        out_THD,
        work.rows_S,
        work.first_slot_S1,
        H=heads,
        D=d,
        BLOCK_D=block_d,
        BLOCK_C=16,
        num_warps=4,
    )
