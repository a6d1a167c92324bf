"""Products with FP8 weights in torch."""

from __future__ import annotations

from torch import Tensor


def fp8_matmul(
    x_TI: Tensor, codes_OI: Tensor, scales_RK: Tensor, tall: int, wide: int, bias_O: Tensor | None = None
) -> Tensor:
    """[T, O]; a scale is that of `tall` outputs by `wide` inputs."""
    outputs, inputs = codes_OI.shape
    scales_OI = scales_RK.repeat_interleave(tall, 0)[:outputs].repeat_interleave(wide, 1)[:, :inputs]
    out_TO = x_TI.float() @ (codes_OI.float() * scales_OI).t()
    return (out_TO if bias_O is None else out_TO + bias_O.float()).to(x_TI.dtype)
