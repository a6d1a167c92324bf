"""RoPE + KV-block write against its reference; the write must touch its own slots and nothing else."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import rope as reference
from torch import Tensor

from tests.support.kernels import assert_close

rope = pytest.importorskip("pdkernels.rope", exc_type=ImportError)


def table(positions: int, head_dim: int, device: str) -> Tensor:
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.arange(positions, device=device).float()[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def indices(values: list[int] | Tensor, device: str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "block_tokens"),
    [(0, 4, 2, 8, 4), (1, 1, 1, 2, 1), (5, 9, 3, 64, 16), (4, 4, 4, 80, 64), (3, 12, 2, 128, 64)],
)
def test_rope_and_write_is_the_reference(
    device: str,
    dtype: torch.dtype,
    normed: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
) -> None:
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    pool = torch.randn(6, 3, 2, kv_heads, block_tokens, head_dim, device=device).to(dtype)
    wanted_pool = pool.clone()
    slots = indices(torch.randperm(6 * block_tokens)[:tokens], device)
    if tokens > 2:
        slots[1] = -1
    positions = indices(torch.randint(0, 50, (tokens,)), device)
    weights = tuple(torch.randn(head_dim, device=device).to(dtype) for _ in range(2))
    norm = rope.QKNorm(weights[0], weights[1], 1e-6) if normed else None
    cos_sin = table(50, head_dim, device)
    wanted = reference.rope_and_write(
        q,
        k,
        v,
        wanted_pool,
        1,
        cos_sin_PD=cos_sin,
        positions_T=positions,
        slots_T=slots,
        qk_weights=(weights[0], weights[1]) if normed else None,
        eps=1e-6,
    )
    found = rope.rope_and_write(
        q, k, v, pool, 1, cos_sin_PD=cos_sin, positions_T=positions, slots_T=slots, qk_norm=norm
    )
    assert_close(found, wanted, scale=4 if normed else 1)
    assert torch.equal(pool[:, :, 1], wanted_pool[:, :, 1])  # values are copied, not computed
    assert torch.equal(pool[:, [0, 2]], wanted_pool[:, [0, 2]])  # other layers are not touched
    assert_close(pool, wanted_pool, scale=4 if normed else 1)


def test_position_zero_is_not_rotated(device: str) -> None:
    q, k = torch.randn(1, 2, 16, device=device), torch.randn(1, 1, 16, device=device)
    pool = torch.zeros(1, 1, 2, 1, 4, 16, device=device)
    zero = indices([0], device)
    out = rope.rope_and_write(
        q, k, k, pool, 0, cos_sin_PD=table(1, 16, device), positions_T=zero, slots_T=indices([3], device)
    )
    assert torch.equal(out, q)
    assert torch.equal(pool[0, 0, 0, :, 3], k[0])


def test_inputs_a_kernel_cannot_take_are_named(device: str) -> None:
    q, k = torch.randn(2, 4, 16, device=device), torch.randn(2, 2, 16, device=device)
    pool = torch.zeros(3, 1, 2, 2, 4, 16, device=device)
    good = {"cos_sin_PD": table(9, 16, device), "positions_T": indices([0, 1], device)}
    good["slots_T"] = indices([0, 1], device)

    def refused(argument: str, *args: object, **changed: Tensor) -> None:
        with pytest.raises(KernelInputError) as error:
            rope.rope_and_write(*args, **(good | changed))
        assert error.value.argument == argument

    refused("layer", q, k, k, pool, 1)
    refused("k", q, k[:1], k, pool, 0)
    refused("v", q, k, k.half(), pool, 0)
    refused("pool", q, k, k, pool[..., :8], 0)
    refused("slots", q, k, k, pool, 0, slots_T=good["slots_T"].long())
    refused("positions", q, k, k, pool, 0, positions_T=good["positions_T"][:1])
    refused("cos_sin", q, k, k, pool, 0, cos_sin_PD=good["cos_sin_PD"].half())
