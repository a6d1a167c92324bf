"""Paged prefill attention against the reference, sequence by sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.plan import plan_prefill
from pdkernels.reference.attention import paged_attention
from torch import Tensor

from tests.support.kernels import assert_close, scattered_blocks, tables_tensor

prefill = pytest.importorskip("pdkernels.prefill_attention", exc_type=ImportError)

Slices = list[tuple[int, int]]
"""(start, length) of each sequence."""


def run(
    slices: Slices,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: str,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    poison_tail: bool = False,
) -> tuple[Tensor, Tensor]:
    """Found and wanted outputs; rows of no sequence lie between the sequences and must stay 7."""
    ends = [start + length for start, length in slices]
    num_blocks = sum(-(-end // block_tokens) for end in ends) + 2
    blocks = scattered_blocks(ends, block_tokens, torch.randperm(num_blocks).tolist())
    pool = torch.randn(num_blocks, 2, 2, kv_heads, block_tokens, head_dim, device=device).to(dtype)
    if poison_tail:
        for mine, end in zip(blocks, ends, strict=True):
            pool[mine[-1], :, :, :, (end - 1) % block_tokens + 1 :] = float("nan")
    rows = np.cumsum([1] + [length + 1 for _, length in slices])
    q = torch.randn(int(rows[-1]), heads, head_dim, device=device).to(dtype)
    wanted = torch.full_like(q, 7.0)
    for (start, length), row, mine in zip(slices, rows, blocks, strict=False):
        wanted[row : row + length] = paged_attention(
            q[row : row + length], pool, 1, mine, start, scale=scale, window=window, soft_cap=soft_cap
        )
    lengths = np.array([length for _, length in slices], dtype=np.int32)
    starts = np.array([start for start, _ in slices], dtype=np.int32)
    tiles = plan_prefill(lengths, starts, tile_tokens=prefill.prefill_tile_tokens(pool, heads))

    def put(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    work = prefill.PrefillWork(
        row_S=put(rows[:-1]),
        length_S=put(lengths),
        start_S=put(starts),
        tables_SM=tables_tensor(blocks, device),
        seq_I=put(np.append(tiles.seq_I, -1)),
        first_I=put(np.append(tiles.first_I, 0)),
    )
    out = torch.full_like(q, 7.0)
    prefill.prefill_attention(q, pool, 1, work, out, scale=scale, window=window, soft_cap=soft_cap)
    return out, wanted


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "slices"),
    [
        (9, 3, 64, 64, [(0, 65), (3, 1), (100, 30)]),
        (4, 1, 128, 16, [(0, 1), (47, 33)]),
        (7, 1, 80, 64, [(0, 20), (64, 0), (64, 7)]),  # odd heads and head_dim; an empty sequence
        (2, 2, 16, 8, [(0, 70), (5, 9)]),
        (2, 1, 256, 32, [(31, 34)]),
        (160, 1, 16, 64, [(3, 3)]),  # more heads than the configured tile
    ],
)
def test_prefill_attention_is_the_reference(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    slices: Slices,
) -> None:
    scale = 1 / math.sqrt(head_dim)
    found, wanted = run(slices, heads, kv_heads, head_dim, block_tokens, dtype, device, scale=scale)
    assert_close(found, wanted)


@pytest.mark.parametrize("window", [1, 7, 32, 40, 1000])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_window_and_soft_cap_are_those_of_the_reference(
    device: str, window: int, soft_cap: float | None
) -> None:
    slices = [(0, 50), (90, 21), (33, 1)]
    found, wanted = run(
        slices, 4, 2, 32, 16, torch.float32, device, scale=0.4, window=window, soft_cap=soft_cap
    )
    assert_close(found, wanted)


def test_stale_garbage_behind_the_last_token_does_not_show(device: str) -> None:
    found, wanted = run([(0, 3), (60, 9)], 2, 1, 16, 64, torch.float32, device, scale=0.3, poison_tail=True)
    assert_close(found, wanted)


def test_large_scores_neither_overflow_nor_become_nan(device: str) -> None:
    found, wanted = run([(0, 30)], 2, 1, 16, 16, torch.float32, device, scale=300.0)
    assert not found.isnan().any()
    assert_close(found, wanted, scale=20)  # scores near 1000 have 4 fewer digits after the point


def test_inputs_a_kernel_cannot_take_are_named(device: str) -> None:
    q = torch.randn(3, 4, 16, device=device)
    pool = torch.randn(2, 1, 2, 2, 16, 16, device=device)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    work = prefill.PrefillWork(
        row_S=one, length_S=one, start_S=one, tables_SM=one[None], seq_I=one, first_I=one
    )
    for argument, args in {
        "layer": (q, pool, -1, work, torch.empty_like(q)),
        "q": (q[:, :3], pool, 0, work, torch.empty_like(q[:, :3])),
        "pool": (q, pool.half(), 0, work, torch.empty_like(q)),
        "out": (q, pool, 0, work, torch.empty_like(q)[:2]),
    }.items():
        with pytest.raises(KernelInputError) as error:
            prefill.prefill_attention(*args, scale=1.0)
        assert error.value.argument == argument
