"""Causal attention of a ragged batch of new tokens over their KV blocks (paged, chunked prefill).

A tile holds the query heads of one kv head for several neighbouring tokens (row r is token r // G, head
r % G), so K and V are read once for all of them and short chunks fill the matrix unit too.

Shape legend: S sequences, T rows of the step, H query heads, K kv heads, G = H / K, D head_dim, N blocks,
L layers, B tokens of a block, I query tiles of the plan, M rows of a tile.

KV range of one tile, with a sliding window:

    0 ... |  lower edge: masked  |  seen by every row: no mask  |  diagonal: masked  | ... context
          first                  inner                          outer               last
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


@jit
def _attend(
    q_MD: tl.tensor,
    acc_MD: tl.tensor,
    max_M: tl.tensor,
    sum_M: tl.tensor,
    position_M: tl.tensor,
    k_pool: tl.tensor,
    v_pool: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    pool_stride_n: tl.tensor,
    D: tl.constexpr,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over KV tiles [first, last); `end` is the first token whose memory may be garbage."""
    d_D = tl.arange(0, BLOCK_D)
    for n in range(first, last, BLOCK_N):
        at_N = kv_offsets(table, n, end, pool_stride_n, B, D, BLOCK_N)
        n_N = n + tl.arange(0, BLOCK_N)
        if D == BLOCK_D:
            k_DN = tl.load(k_pool + at_N[None, :] + d_D[:, None])
        else:
            k_DN = tl.load(k_pool + at_N[None, :] + d_D[:, None], mask=(d_D < D)[:, None], other=0.0)
        k_DN = cached(k_DN, q_MD.dtype, FP8)
        s_MN = scaled_scores(tl.dot(q_MD, k_DN, input_precision=PRECISION), scale, SOFT_CAP)
        if MASKED:
            seen_MN = n_N[None, :] <= position_M[:, None]
            if WINDOW > 0:
                seen_MN = seen_MN & (n_N[None, :] > position_M[:, None] - WINDOW)
            s_MN = tl.where(seen_MN, s_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(s_MN, axis=1))
        base_M = new_max_M
        if MASKED:
            # A row that has seen nothing yet has no maximum; any finite base gives it zeros.
            base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        p_MN = tl.exp2(s_MN - base_M[:, None])
        shrink_M = tl.exp2(max_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, axis=1)
        acc_MD = acc_MD * shrink_M[:, None]
        if MASKED:
            v_ND = tl.load(
                v_pool + at_N[:, None] + d_D[None, :],
                mask=(n_N < end)[:, None] & (d_D < D)[None, :],
                other=0.0,
            )
        elif D == BLOCK_D:
            v_ND = tl.load(v_pool + at_N[:, None] + d_D[None, :])
        else:
            v_ND = tl.load(v_pool + at_N[:, None] + d_D[None, :], mask=(d_D < D)[None, :], other=0.0)
        v_ND = cached(v_ND, q_MD.dtype, FP8)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
        max_M = new_max_M
    return acc_MD, max_M, sum_M


@jit_for_any("layer", "table_stride")
def prefill_kernel(
    q: tl.tensor,
    pool: tl.tensor,
    out: tl.tensor,
    tables: tl.tensor,
    row_of: tl.tensor,
    length_of: tl.tensor,
    start_of: tl.tensor,
    tile_seq: tl.tensor,
    tile_first: tl.tensor,
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
    # grid (K, I): kv heads are neighbours in launch order, so tiles with most KV start first in every head.
    G: tl.constexpr = H // K
    TILE_TOKENS: tl.constexpr = BLOCK_M // G
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    seq = tl.load(tile_seq + tile)
    if seq < 0:
        return
    first_token = tl.load(tile_first + tile)
    length = tl.load(length_of + seq)
    start = tl.load(start_of + seq)
    row = tl.load(row_of + seq).to(tl.int64)
    m_M = tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    token_M = first_token + m_M // G
    live_M = (token_M < length) & (m_M < TILE_TOKENS * G)
    live_MD = live_M[:, None] & (d_D < D)[None, :]
    head_M = kv_head * G + m_M % G
    q_row_M = (row + token_M) * q_stride + head_M * D
    q_MD = tl.load(q + q_row_M[:, None] + d_D[None, :], mask=live_MD, other=0.0)
    table = tables + seq.to(tl.int64) * table_stride
    k_pool = pool + layer * pool_stride_l + kv_head * (B * D)
    v_pool = k_pool + K * B * D

    position_M = start + token_M
    end = start + tl.minimum(first_token + TILE_TOKENS, length)
    outer = (start + first_token + 1) // BLOCK_N * BLOCK_N
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    inner = 0
    if WINDOW > 0:
        first = tl.maximum(start + first_token - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        inner = (tl.maximum(end - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        inner = tl.minimum(inner, outer)
        acc_MD, max_M, sum_M = _attend(
            q_MD, acc_MD, max_M, sum_M, position_M, k_pool, v_pool, table, first, inner, end, scale,
            pool_stride_n, D, B, WINDOW, SOFT_CAP, True, BLOCK_N, BLOCK_D, PRECISION, FP8,
        )  # fmt: skip
        inner = tl.maximum(first, inner)
    acc_MD, max_M, sum_M = _attend(
        q_MD, acc_MD, max_M, sum_M, position_M, k_pool, v_pool, table, inner, outer, end, scale,
        pool_stride_n, D, B, WINDOW, SOFT_CAP, False, BLOCK_N, BLOCK_D, PRECISION, FP8,
    )  # fmt: skip
    outer = tl.maximum(inner, outer)
    acc_MD, max_M, sum_M = _attend(
        q_MD, acc_MD, max_M, sum_M, position_M, k_pool, v_pool, table, outer, end, end, scale,
        pool_stride_n, D, B, WINDOW, SOFT_CAP, True, BLOCK_N, BLOCK_D, PRECISION, FP8,
    )  # fmt: skip

    # Rows without a token may have seen nothing; they are not stored.
    acc_MD = acc_MD / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
    if FP8 > 0:
        acc_MD = acc_MD * v_scale
    to_M = (row + token_M) * (H * D) + head_M * D
    tl.store(out + to_M[:, None] + d_D[None, :], acc_MD.to(out.dtype.element_ty), mask=live_MD)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWork:
    """The step's plan on the device, all int32 and contiguous: `plan.PrefillTiles` and the batch itself."""

    row_S: Tensor
    """Row of each sequence's first new token among the T rows of q and out."""
    length_S: Tensor
    """New tokens of the sequence."""
    start_S: Tensor
    """Tokens before them; the KV of all start + length tokens is in the pool."""
    tables_SM: Tensor
    """Block tables, [S, max blocks]; entries past a sequence's blocks are not read."""
    seq_I: Tensor
    """Sequence of a tile; -1 marks an unused one."""
    first_I: Tensor


def _block_m(pool: Tensor, num_heads: int, dtype: torch.dtype) -> int:
    config = attention_config(
        device_config(pool.device).prefill, dtype.itemsize, next_power_of_2(max(16, pool.shape[5]))
    )
    return max(config.block_m, next_power_of_2(num_heads // pool.shape[3]))


def prefill_tile_tokens(pool: Tensor, num_heads: int, dtype: torch.dtype | None = None) -> int:
    """Tokens per query tile for this pool: what `plan_prefill` must cut by. dtype: of the queries, where it
    is not the pool's."""
    return _block_m(pool, num_heads, dtype or pool.dtype) // (num_heads // pool.shape[3])


def _validate(q_THD: Tensor, pool: Tensor, layer: int, work: PrefillWork, out_THD: Tensor) -> None:
    op = "prefill_attention"
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
    s, i = work.row_S.shape[0], work.seq_I.shape[0]
    for name in ("row_S", "length_S", "start_S"):
        require_int32(op, name, getattr(work, name), (s,))
    for name in ("seq_I", "first_I"):
        require_int32(op, name, getattr(work, name), (i,))
    require_int32(op, "tables_SM", work.tables_SM, (s, None))


def prefill_attention(
    q_THD: Tensor,
    pool: Tensor,
    layer: int,
    work: PrefillWork,
    out_THD: Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Causal softmax(cap(q k^T * scale)) v (Dao 2023, "FlashAttention-2"); writes the batch's rows of out.

    q_THD: rotated queries, dense in heads and head_dim. pool: [N, L, 2, K, B, D] of q's dtype or
    float8_e4m3fn, holding the new tokens' KV too. kv_scales: what numbers of an FP8 pool's keys and values
    are multiplied by. window: a query sees the last `window` tokens, itself included. The plan must come
    from `plan_prefill` with `prefill_tile_tokens(pool, H, q.dtype)`. One launch, no synchronisation. Raises
    `KernelInputError`.
    """
    _validate(q_THD, pool, layer, work, out_THD)
    heads, d = q_THD.shape[1:]
    kv_heads, block_tokens = pool.shape[3:5]
    num_tiles = work.seq_I.shape[0]
    if num_tiles == 0:
        return
    block_d = next_power_of_2(max(16, d))
    config = attention_config(device_config(pool.device).prefill, q_THD.element_size(), block_d)
    fp8 = fp8_mode(pool)
    prefill_kernel[(kv_heads, num_tiles)](
        q_THD,
        stored(pool),
        out_THD,
        work.tables_SM,
        work.row_S,
        work.length_S,
        work.start_S,
        work.seq_I,
        work.first_I,
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
        BLOCK_M=_block_m(pool, heads, q_THD.dtype),
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        FP8=fp8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
