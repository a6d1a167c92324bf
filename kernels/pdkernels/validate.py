"""Checks the wrappers share. They look at metadata only: no device work, no synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdkernels.errors import KernelInputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def require(ok: bool, op: str, argument: str, *, wanted: str, found: object) -> None:
    """Raise `KernelInputError` unless `ok`."""
    if not ok:
        raise KernelInputError(op, argument, wanted=wanted, found=found)


def require_shape(op: str, argument: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise unless `tensor` has `shape`; None matches any size."""
    fits = len(shape) == tensor.dim() and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
    require(fits, op, argument, wanted=f"of shape {wanted}", found=list(tensor.shape))


def require_like(op: str, argument: str, tensor: Tensor, other: Tensor) -> None:
    """Raise unless `tensor` has the dtype and device of `other`."""
    require(tensor.dtype == other.dtype, op, argument, wanted=str(other.dtype), found=tensor.dtype)
    require(tensor.device == other.device, op, argument, wanted=f"on {other.device}", found=tensor.device)


def require_float(op: str, argument: str, tensor: Tensor) -> None:
    require(tensor.dtype in FLOATS, op, argument, wanted="float32, float16 or bfloat16", found=tensor.dtype)


def require_int32(op: str, argument: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    require(tensor.dtype == torch.int32, op, argument, wanted="int32", found=tensor.dtype)
    require_shape(op, argument, tensor, shape)
    require(tensor.is_contiguous(), op, argument, wanted="contiguous", found=tensor.stride())


def require_rows(op: str, argument: str, tensor: Tensor) -> None:
    """Raise unless the last dimension is dense (other strides are free)."""
    dense = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    require(dense, op, argument, wanted="dense in its last dimension", found=tensor.stride())


def require_pool(op: str, pool: Tensor, layer: int) -> None:
    """Raise unless `pool` is a contiguous [block, layer, 2, kv_head, token, head_dim] and has `layer`."""
    require_shape(op, "pool", pool, (None, None, 2, None, None, None))
    require(pool.is_contiguous(), op, "pool", wanted="contiguous", found=pool.stride())
    block_elements = pool.stride(0)
    require(block_elements < 2**31, op, "pool", wanted="of under 2^31 elements a block", found=block_elements)
    require(0 <= layer < pool.shape[1], op, "layer", wanted=f"in [0, {pool.shape[1]})", found=layer)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def ceil_div(n: int, d: int) -> int:
    return -(-n // d)
