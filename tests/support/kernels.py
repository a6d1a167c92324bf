"""Shared by the kernel tests: closeness with a reason, poisoned memory, sound dtypes per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCES = {
    # Only the order of fp32 additions and the device's exp differ: a few units of 2^-23, grown by sums.
    torch.float32: 2e-5,
    # One or two roundings to 11 bits (2^-11 = 4.9e-4) of results around 1, probabilities rounded as well.
    torch.float16: 2e-3,
    # The same with 8 bits (2^-8 = 3.9e-3).
    torch.bfloat16: 1.6e-2,
}


def assert_close(found: Tensor, wanted: Tensor, *, scale: float = 1.0) -> None:
    """Equal within the tolerance of `found`'s dtype, times `scale` where sums are long."""
    tolerance = TOLERANCES[found.dtype] * scale
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


def poisoned_empty(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.empty` whose memory shows when nobody writes it: NaN, or the dtype's smallest integer."""

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    return poisoned


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences scattered over a pool, with one query row each in shuffled order, and one spare row."""

    q: Tensor
    pool: Tensor
    tables: Tensor
    blocks: list[list[int]]
    context: list[int]
    rows: list[int]
    spare_row: int


def scattered_blocks(tokens: Sequence[int], block_tokens: int, free: list[int]) -> list[list[int]]:
    """Block tables for sequences of these lengths, drawn from `free` (which loses them)."""
    return [[free.pop() for _ in range(-(-count // block_tokens))] for count in tokens]


def tables_tensor(blocks: list[list[int]], device: str) -> Tensor:
    """Padded block tables; entries that must not be read point far outside any pool."""
    width = max([1, *map(len, blocks)])
    rows = [row + [2**30] * (width - len(row)) for row in blocks]
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(blocks), width)


def paged_batch(
    context: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: str,
) -> Batch:
    """A random decode batch over a pool of three layers."""
    needed = sum(-(-tokens // block_tokens) for tokens in context) + 2
    blocks = scattered_blocks(context, block_tokens, torch.randperm(needed).tolist())
    order = torch.randperm(len(context) + 1).tolist()
    pool = torch.randn(needed, 3, 2, kv_heads, block_tokens, head_dim, device=device).to(dtype)
    return Batch(
        q=torch.randn(len(context) + 1, heads, head_dim, device=device).to(dtype),
        pool=pool,
        tables=tables_tensor(blocks, device),
        blocks=blocks,
        context=context,
        rows=order[:-1],
        spare_row=order[-1],
    )


def int32_bits(shape: tuple[int, ...], device: str) -> Tensor:
    """Random words of every sign and exponent: NaN payloads and infinities among them."""
    return torch.randint(-(2**31), 2**31 - 1, shape, device=device).to(torch.int32)
