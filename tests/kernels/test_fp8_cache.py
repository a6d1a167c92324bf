"""An FP8 KV cache: what is written is rounded once, and attention is that of the numbers in the pool."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pdkernels.reference.attention import paged_attention
from torch import Tensor

from tests.support.kernels import assert_close, paged_batch, scattered_blocks, tables_tensor

decode = pytest.importorskip("pdkernels.decode_attention", exc_type=ImportError)
prefill = pytest.importorskip("pdkernels.prefill_attention", exc_type=ImportError)
rope = pytest.importorskip("pdkernels.rope", exc_type=ImportError)
plan = pytest.importorskip("pdkernels.plan")

E4M3 = torch.float8_e4m3fn
SCALES = (0.5, 2.0)


@pytest.fixture(params=["converted by the GPU", "made of bits"])
def _mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "made of bits":
        for module in (decode, prefill):
            monkeypatch.setattr(module, "fp8_mode", lambda _: 1)


def fp8_pool(pool: Tensor) -> Tensor:
    return pool.float().clamp(-448, 448).to(E4M3)


def numbers(pool: Tensor) -> Tensor:
    """What the pool stands for, in float32."""
    scaled = pool.float()
    scaled[:, :, 0] *= SCALES[0]
    scaled[:, :, 1] *= SCALES[1]
    return scaled


def int32(values: object, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def test_values_are_rounded_to_the_nearest_number_of_the_format(device: str) -> None:
    # All numbers of the format, points between them, halves of a step (ties), and what is out of range.
    grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    grid = grid[~grid.isnan()].sort().values
    middles = (grid[1:] + grid[:-1]) / 2
    v = torch.cat([grid, middles, middles * 1.01, middles * 0.99, torch.tensor([1e6, -1e6, 449.0, 1e-9])])
    v = torch.nn.functional.pad(v, (0, -len(v) % 64)).view(-1, 1, 64).to(device)
    rows = v.shape[0]
    pool = torch.zeros(rows, 1, 2, 1, 1, 64, device=device).to(E4M3)
    zeros = torch.zeros_like(v)
    index = int32(list(range(rows)), device)
    table = torch.cat([torch.ones(rows, 32), torch.zeros(rows, 32)], dim=1).to(device)
    rope.rope_and_write(
        zeros, zeros, v, pool, 0, cos_sin_PD=table, positions_T=index, slots_T=index, kv_scales=(1.0, 2.0)
    )
    wanted = (v / 2).clamp(-448, 448).to(E4M3)
    assert torch.equal(pool[:, 0, 1, 0, 0].float(), wanted[:, 0].float())


def test_keys_are_rotated_before_they_are_rounded(device: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(5, heads, 64, device=device).to(dtype) for heads in (4, 2, 2))
    pool = torch.zeros(3, 2, 2, 2, 16, 64, device=device).to(E4M3)
    angles = torch.arange(50, device=device).float()[:, None] * torch.rand(32, device=device)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    plain = torch.zeros(3, 2, 2, 2, 16, 64, device=device, dtype=torch.float32)
    index = {
        "positions_T": int32([0, 3, 49, 7, 8], device),
        "slots_T": int32([40, 2, -1, 17, 31], device),
    }
    rope.rope_and_write(q, k, v, pool, 1, cos_sin_PD=table, kv_scales=SCALES, **index)
    rope.rope_and_write(q.float(), k.float(), v.float(), plain, 1, cos_sin_PD=table, **index)
    # Half a step of 3 bits, and of the smallest number; the step is the scale's.
    torch.testing.assert_close(numbers(pool), plain, rtol=2.0**-4 * 1.01, atol=2.0**-9)
    assert not pool[:, 0].float().any()


@pytest.mark.usefixtures("_mode")
@pytest.mark.parametrize("window", [None, 20])
def test_decode_attention_is_that_of_the_numbers_in_the_pool(
    device: str, dtype: torch.dtype, window: int | None
) -> None:
    batch = paged_batch([1, 40, 130], 4, 2, 64, 16, dtype, device)
    pool = fp8_pool(batch.pool)
    items = plan.plan_decode(
        np.array(batch.context, dtype=np.int32),
        num_kv_heads=2,
        num_programs=8,
        tile=decode.decode_tile(pool, dtype),
        window=window,
    )
    work = decode.DecodeWork(
        rows_S=int32(batch.rows, device),
        context_S=int32(batch.context, device),
        tables_SM=batch.tables,
        seq_C=int32(items.seq_C, device),
        begin_C=int32(items.begin_C, device),
        end_C=int32(items.end_C, device),
        slot_C=int32(items.slot_C, device),
        first_slot_S1=int32(items.first_slot_S1, device),
    )
    out = torch.empty_like(batch.q)
    scale = 1 / math.sqrt(64)
    decode.decode_attention(batch.q, pool, 1, work, out, scale=scale, window=window, kv_scales=SCALES)
    for seq, tokens in enumerate(batch.context):
        row = slice(batch.rows[seq], batch.rows[seq] + 1)
        wanted = paged_attention(
            batch.q[row], numbers(pool), 1, batch.blocks[seq], tokens - 1, scale=scale, window=window
        )
        assert_close(out[row], wanted, scale=2)


@pytest.mark.usefixtures("_mode")
def test_prefill_attention_is_that_of_the_numbers_in_the_pool(device: str, dtype: torch.dtype) -> None:
    slices = [(0, 40), (33, 5)]
    blocks = scattered_blocks([40, 38], 16, torch.randperm(8).tolist())
    pool = fp8_pool(torch.randn(8, 2, 2, 2, 16, 64, device=device))
    q = torch.randn(45, 4, 64, device=device).to(dtype)
    lengths, starts = (np.array([s[i] for s in slices], dtype=np.int32) for i in (1, 0))
    tiles = plan.plan_prefill(lengths, starts, tile_tokens=prefill.prefill_tile_tokens(pool, 4, dtype))
    work = prefill.PrefillWork(
        row_S=int32([0, 40], device),
        length_S=int32(lengths, device),
        start_S=int32(starts, device),
        tables_SM=tables_tensor(blocks, device),
        seq_I=int32(tiles.seq_I, device),
        first_I=int32(tiles.first_I, device),
    )
    out = torch.empty_like(q)
    prefill.prefill_attention(q, pool, 1, work, out, scale=0.125, kv_scales=SCALES)
    for (start, length), row, mine in zip(slices, (0, 40), blocks, strict=True):
        rows = slice(row, row + length)
        assert_close(out[rows], paged_attention(q[rows], numbers(pool), 1, mine, start, scale=0.125), scale=2)
