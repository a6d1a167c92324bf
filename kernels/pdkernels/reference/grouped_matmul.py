"""Products of a mixture of experts in torch, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_matmul(x_RI: Tensor, weight_XOI: Tensor, expert_N: Tensor) -> Tensor:
    """[N, O]; product n is of row n // (N / R)."""
    share = expert_N.shape[0] // max(1, x_RI.shape[0])
    rows = [x_RI[n // share].float() @ weight_XOI[e].float().t() for n, e in enumerate(expert_N.tolist())]
    if not rows:
        return x_RI.new_zeros(0, weight_XOI.shape[1])
    return torch.stack(rows).to(x_RI.dtype)
