"""Gather and scatter of KV blocks: scattered blocks of a pool to and from one packed buffer.

Both take a window of layers and of kv heads, so they also reshape between tensor-parallel sizes: a rank with
half the heads packs all of its own, the receiver scatters them into its half of a larger pool.

    pool [N, L, 2, K, B, D] ──ids_M, layers, heads──> packed [M, l, 2, k, B, D]   (and back)

Shape legend: N blocks of the pool, L layers, K kv heads, B tokens of a block, D head_dim, M chosen blocks.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from pdkernels._triton import jit_for_any, tl
from pdkernels.validate import ceil_div, require, require_int32, require_like, require_pool, require_shape

BLOCK: Final = 2048
WORDS: Final = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


@jit_for_any("first_row", "packed_rows")
def copy_blocks_kernel(
    pool: tl.tensor,
    packed: tl.tensor,
    block_ids: tl.tensor,
    first_row: tl.tensor,
    first_col: tl.tensor,
    packed_rows: tl.tensor,
    cols: tl.tensor,
    pool_cols: tl.tensor,
    pool_stride: tl.tensor,
    TO_POOL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # grid (M * rows, ceil(cols / BLOCK)): one (layer, K or V) of one block, and a stretch of its heads.
    pair = tl.program_id(0)
    chosen = pair // packed_rows
    row = pair % packed_rows
    col_C = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live_C = col_C < cols
    block = tl.load(block_ids + chosen).to(tl.int64)
    in_pool = pool + block * pool_stride + (first_row + row) * pool_cols + first_col + col_C
    in_packed = packed + pair.to(tl.int64) * cols + col_C
    if TO_POOL:
        tl.store(in_pool, tl.load(in_packed, mask=live_C), mask=live_C)
    else:
        tl.store(in_packed, tl.load(in_pool, mask=live_C), mask=live_C)


def gather_blocks(
    pool: Tensor, block_ids_M: Tensor, *, layers: range | None = None, heads: range | None = None
) -> Tensor:
    """Pack scattered KV blocks into one contiguous buffer.

    pool: [N, L, 2, K, B, D], contiguous. block_ids_M: int32, each in [0, N); order is kept. layers, heads:
    the window, all by default; steps of 1. Returns [M, len(layers), 2, len(heads), B, D] of the same dtype;
    bytes are copied as they are. Raises `KernelInputError`.
    """
    layers, heads = _window("gather_blocks", pool, block_ids_M, layers, heads)
    shape = (block_ids_M.shape[0], len(layers), 2, len(heads), *pool.shape[4:])
    packed = torch.empty(shape, dtype=pool.dtype, device=pool.device)
    _copy(pool, packed, block_ids_M, layers, heads, to_pool=False)
    return packed


def scatter_blocks(
    packed: Tensor,
    pool: Tensor,
    block_ids_M: Tensor,
    *,
    layers: range | None = None,
    heads: range | None = None,
) -> None:
    """The inverse of `gather_blocks`: write `packed` into blocks of the pool, outside the window nothing.

    block_ids_M: each at most once. Raises `KernelInputError`.
    """
    op = "scatter_blocks"
    layers, heads = _window(op, pool, block_ids_M, layers, heads)
    require_shape(op, "packed", packed, (block_ids_M.shape[0], len(layers), 2, len(heads), *pool.shape[4:]))
    require_like(op, "packed", packed, pool)
    require(packed.is_contiguous(), op, "packed", wanted="contiguous", found=packed.stride())
    _copy(pool, packed, block_ids_M, layers, heads, to_pool=True)


def _window(
    op: str, pool: Tensor, block_ids_M: Tensor, layers: range | None, heads: range | None
) -> tuple[range, range]:
    require_pool(op, pool, 0)
    require_int32(op, "block_ids", block_ids_M, (None,))
    chosen = []
    for name, window, size in (("layers", layers, pool.shape[1]), ("heads", heads, pool.shape[3])):
        window = range(size) if window is None else window
        fits = window.step == 1 and 0 <= window.start < window.stop <= size
        require(fits, op, name, wanted=f"a non-empty range within [0, {size})", found=window)
        chosen.append(window)
    return chosen[0], chosen[1]


def _copy(
    pool: Tensor, packed: Tensor, block_ids_M: Tensor, layers: range, heads: range, *, to_pool: bool
) -> None:
    if packed.numel() == 0:
        return
    # Words of 4 bytes where a head's tokens fill them: copies need no dtype.
    head_bytes = pool.stride(3) * pool.element_size()
    word_bytes = next(size for size in WORDS if head_bytes % size == 0)
    scale = head_bytes // word_bytes
    words = WORDS[word_bytes]
    pool_words, packed_words = pool.view(-1).view(words), packed.view(-1).view(words)
    cols = len(heads) * scale
    rows = len(layers) * 2
    copy_blocks_kernel[(block_ids_M.shape[0] * rows, ceil_div(cols, BLOCK))](
        pool_words,
        packed_words,
        block_ids_M,
        layers.start * 2,
        heads.start * scale,
        rows,
        cols,
        pool.shape[3] * scale,
        pool_words.numel() // pool.shape[0],
        TO_POOL=to_pool,
        BLOCK=BLOCK,
        num_warps=4,
    )
