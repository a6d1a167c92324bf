"""Rotary embedding and the write into KV blocks in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pdkernels.reference.norm import rms_norm


def rotate(x_THD: Tensor, cos_sin_PD: Tensor, positions_T: Tensor) -> Tensor:
    """Half-split rotation in fp32, rounded once to x's dtype."""
    cos, sin = cos_sin_PD[positions_T.long()].chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    lo, hi = x_THD.float().chunk(2, dim=-1)
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], dim=-1).to(x_THD.dtype)


def rope_and_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    pool: Tensor,
    layer: int,
    *,
    cos_sin_PD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    qk_weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See `pdkernels.rope.rope_and_write`."""
    if qk_weights is not None:
        q_THD, k_TKD = rms_norm(q_THD, qk_weights[0], eps), rms_norm(k_TKD, qk_weights[1], eps)
    k_TKD = rotate(k_TKD, cos_sin_PD, positions_T)
    block_tokens = pool.shape[4]
    for row, slot in enumerate(slots_T.tolist()):
        if slot >= 0:
            for which, number in ((0, k_TKD[row]), (1, v_TKD[row])):
                if pool.dtype == torch.float8_e4m3fn:
                    number = number.float().clamp(-448, 448)
                pool[slot // block_tokens, layer, which, :, slot % block_tokens] = number.to(pool.dtype)
    return rotate(q_THD, cos_sin_PD, positions_T)
