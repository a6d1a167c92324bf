"""Products with 4-bit codes in torch."""

from __future__ import annotations

from torch import Tensor


def w4_matmul(
    x_TI: Tensor, codes_OI: Tensor, zeros_GO: Tensor, scales_GO: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """[T, O]; groups are runs of I / G inputs."""
    size = codes_OI.shape[1] // scales_GO.shape[0]
    zeros_OI = zeros_GO.float().t().repeat_interleave(size, 1)
    weight_OI = (codes_OI.float() - zeros_OI) * scales_GO.float().t().repeat_interleave(size, 1)
    out_TO = x_TI.float() @ weight_OI.t()
    return (out_TO if bias_O is None else out_TO + bias_O.float()).to(x_TI.dtype)
