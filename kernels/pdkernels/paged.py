"""What the two attention kernels share: addresses of KV tiles, and the soft cap."""

from __future__ import annotations

from pdkernels._triton import jit, tl


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
