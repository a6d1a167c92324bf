"""RMSNorm in torch."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """fp32 statistics, rounded to x's dtype before the weight is applied."""
    wide = x.float()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)
    return normed * weight_E


def add_rms_norm(x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    residual_TE += x_TE
    return rms_norm(residual_TE, weight_E, eps)
