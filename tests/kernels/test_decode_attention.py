"""Paged decode attention against the reference, sequence by sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.plan import plan_decode
from pdkernels.reference.attention import paged_attention
from torch import Tensor

from tests.support.kernels import Batch, assert_close, paged_batch

decode = pytest.importorskip("pdkernels.decode_attention", exc_type=ImportError)


def work_of(batch: Batch, *, tile: int, programs: int, window: int | None = None) -> decode.DecodeWork:
    context = np.array(batch.context, dtype=np.int32)
    plan = plan_decode(
        context, num_kv_heads=batch.pool.shape[3], num_programs=programs, tile=tile, window=window
    )

    def put(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=batch.pool.device)

    return decode.DecodeWork(
        rows_S=put(batch.rows),
        context_S=put(context),
        tables_SM=batch.tables,
        seq_C=put(plan.seq_C),
        begin_C=put(plan.begin_C),
        end_C=put(plan.end_C),
        slot_C=put(plan.slot_C),
        first_slot_S1=put(plan.first_slot_S1),
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "context", "programs"),
    [
        (9, 3, 64, 64, [1, 64, 65, 130], 3),
        (4, 1, 128, 16, [300], 6),  # split into six, tiles of several blocks
        (7, 1, 80, 64, [200, 0, 3], 4),  # odd heads and head_dim; a padding row
        (2, 2, 16, 8, [17, 5, 90], 16),
        (32, 1, 32, 64, [40], 1),  # more heads than the smallest tile
        (4, 2, 256, 32, [33, 70], 8),
        (2, 1, 16, 64, [1500], 26),  # more parts than the reduction reads at once
    ],
)
def test_decode_attention_is_the_reference(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    context: list[int],
    programs: int,
) -> None:
    batch = paged_batch(context, heads, kv_heads, head_dim, block_tokens, dtype, device)
    work = work_of(batch, tile=decode.decode_tile(batch.pool), programs=programs)
    out = torch.empty_like(batch.q).fill_(7.0)
    scale = 1 / math.sqrt(head_dim)
    decode.decode_attention(batch.q, batch.pool, 1, work, out, scale=scale)
    for seq, tokens in enumerate(context):
        row = batch.rows[seq]
        if tokens == 0:
            assert torch.all(out[row] == 7.0)
            continue
        wanted = paged_attention(
            batch.q[row : row + 1], batch.pool, 1, batch.blocks[seq], tokens - 1, scale=scale
        )
        assert_close(out[row : row + 1], wanted)
    assert torch.all(out[batch.spare_row] == 7.0)


@pytest.mark.parametrize("window", [1, 16, 50, 500])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_window_and_soft_cap_are_those_of_the_reference(
    device: str, window: int, soft_cap: float | None
) -> None:
    batch = paged_batch([3, 200, 64], 4, 2, 32, 16, torch.float32, device)
    work = work_of(batch, tile=decode.decode_tile(batch.pool), programs=8, window=window)
    out = torch.empty_like(batch.q)
    decode.decode_attention(batch.q, batch.pool, 1, work, out, scale=0.5, window=window, soft_cap=soft_cap)
    for seq, tokens in enumerate(batch.context):
        row = slice(batch.rows[seq], batch.rows[seq] + 1)
        wanted = paged_attention(
            batch.q[row],
            batch.pool,
            1,
            batch.blocks[seq],
            tokens - 1,
            scale=0.5,
            window=window,
            soft_cap=soft_cap,
        )
        assert_close(out[row], wanted)


def test_stale_garbage_behind_the_last_token_does_not_show(device: str) -> None:
    batch = paged_batch([5], 2, 1, 16, 64, torch.float32, device)
    work = work_of(batch, tile=decode.decode_tile(batch.pool), programs=1)
    clean, dirty = torch.empty_like(batch.q), torch.empty_like(batch.q)
    decode.decode_attention(batch.q, batch.pool, 1, work, clean, scale=1.0)
    batch.pool[batch.blocks[0][0], :, :, :, 5:] = float("nan")
    decode.decode_attention(batch.q, batch.pool, 1, work, dirty, scale=1.0)
    assert torch.equal(clean[batch.rows[0]], dirty[batch.rows[0]])
    assert not dirty[batch.rows[0]].isnan().any()


def test_a_sequence_does_not_see_another_ones_blocks(device: str) -> None:
    batch = paged_batch([90, 40], 2, 1, 16, 16, torch.float32, device)
    work = work_of(batch, tile=decode.decode_tile(batch.pool), programs=8)
    first, second = torch.empty_like(batch.q), torch.empty_like(batch.q)
    decode.decode_attention(batch.q, batch.pool, 1, work, first, scale=1.0)
    batch.pool[batch.blocks[1]] = 9.0
    decode.decode_attention(batch.q, batch.pool, 1, work, second, scale=1.0)
    assert torch.equal(first[batch.rows[0]], second[batch.rows[0]])


def test_inputs_a_kernel_cannot_take_are_named(device: str) -> None:
    batch = paged_batch([5], 4, 2, 16, 16, torch.float32, device)
    work = work_of(batch, tile=decode.decode_tile(batch.pool), programs=1)
    q, pool = batch.q, batch.pool
    for argument, args in {
        "layer": (q, pool, 9, work, torch.empty_like(q)),
        "q": (q[:, :3], pool, 0, work, torch.empty_like(q[:, :3])),
        "pool": (q, pool.half(), 0, work, torch.empty_like(q)),
        "out": (q, pool, 0, work, torch.empty_like(q).half()),
    }.items():
        with pytest.raises(KernelInputError) as error:
            decode.decode_attention(*args, scale=1.0)
        assert error.value.argument == argument
