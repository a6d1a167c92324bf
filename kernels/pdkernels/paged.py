"""What the two attention kernels share: addresses of KV tiles, FP8 caches, and the soft cap."""

from __future__ import annotations

import torch
from torch import Tensor

from pdkernels._triton import jit, tl
from pdkernels.fp8 import from_e4m3
from pdkernels.tuning import has_fp8
from pdkernels.validate import require, require_like

E4M3 = torch.float8_e4m3fn


def require_cache(op: str, pool: Tensor, x: Tensor) -> None:
    """Raise unless the pool is of x's dtype or FP8, and on its device."""
    if pool.dtype != E4M3:
        require_like(op, "pool", pool, x)
    require(pool.device == x.device, op, "pool", wanted=f"on {x.device}", found=pool.device)


def stored(pool: Tensor) -> Tensor:
    """The pool as kernels take it: FP8 as bytes."""
    return pool.view(torch.uint8) if pool.dtype == E4M3 else pool


def fp8_mode(pool: Tensor) -> int:
    """0: the pool is not FP8; 1: numbers are made of its bits; 2: the GPU converts them."""
    return 0 if pool.dtype != E4M3 else 2 if has_fp8(pool.device) else 1


@jit
def cached(loaded: tl.tensor, dtype: tl.constexpr, FP8: tl.constexpr) -> tl.tensor:
    """What was loaded from the pool, as numbers of the queries' dtype (or the pool's own)."""
    if FP8 > 0:
        loaded = from_e4m3(loaded, dtype, FP8 == 2)
    return loaded


@jit
def kv_offsets(
    table: tl.tensor,
    n: tl.tensor,
    end: tl.tensor,
    pool_stride_n: tl.tensor,
    B: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Pool offsets (elements) of tokens n .. n + BLOCK_N of one sequence; n is a multiple of BLOCK_N."""
    if B % BLOCK_N == 0:
        # The tile lies in one block: one table entry, and rows that follow each other in memory.
        block = tl.load(table + n // B).to(tl.int64)
        offset_N = block * pool_stride_n + (n % B + tl.arange(0, BLOCK_N)) * D
    else:
        n_N = n + tl.arange(0, BLOCK_N)
        block_N = tl.load(table + n_N // B, mask=n_N < end, other=0).to(tl.int64)
        offset_N = block_N * pool_stride_n + (n_N % B) * D
    return offset_N


@jit
def scaled_scores(s: tl.tensor, scale: tl.tensor, SOFT_CAP: tl.constexpr) -> tl.tensor:
    """Scores in units of log2 (1.4427 is log2 e), after scale and soft cap: cap * tanh(s / cap) (Gemma 2)."""
    if SOFT_CAP > 0.0:
        # tanh(x) = 1 - 2 / (e^2x + 1); e^2x may become inf, which is the right limit.
        s = s * (scale / SOFT_CAP)
        s = (SOFT_CAP * 1.4426950408889634) * (1.0 - 2.0 / (tl.exp(2.0 * s) + 1.0))
    else:
        s = s * (scale * 1.4426950408889634)
    return s
