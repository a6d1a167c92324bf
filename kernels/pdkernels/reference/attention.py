"""Paged attention in torch, one sequence at a time, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kv(pool: Tensor, layer: int, blocks: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of a sequence's first `num_tokens` tokens, each [K, num_tokens, D] in fp32."""
    index = torch.tensor(blocks, device=pool.device, dtype=torch.long)
    if pool.dtype == torch.float8_e4m3fn:
        chosen = pool.view(torch.uint8)[index, layer].view(pool.dtype).float()
    else:
        chosen = pool[index, layer].float()
    k_v = chosen.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return k_v[0][:, :num_tokens], k_v[1][:, :num_tokens]


def paged_attention(
    q_THD: Tensor,
    pool: Tensor,
    layer: int,
    blocks: list[int],
    start: int,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of one sequence's new tokens at positions start, start + 1, ...; [T, H, D]."""
    t, heads, _ = q_THD.shape
    kv_heads = pool.shape[3]
    k_KND, v_KND = gather_kv(pool, layer, blocks, start + t)
    k_HND = k_KND.repeat_interleave(heads // kv_heads, dim=0)
    v_HND = v_KND.repeat_interleave(heads // kv_heads, dim=0)
    s_HTN = torch.einsum("thd,hnd->htn", q_THD.float(), k_HND) * scale
    if soft_cap is not None:
        s_HTN = soft_cap * torch.tanh(s_HTN / soft_cap)
    back = (start + torch.arange(t, device=pool.device))[:, None] - torch.arange(
        start + t, device=pool.device
    )
    hidden = back < 0
    if window is not None:
        hidden |= back >= window
    s_HTN = s_HTN.masked_fill(hidden, float("-inf"))
    return torch.einsum("htn,hnd->thd", s_HTN.softmax(-1), v_HND).to(q_THD.dtype)
