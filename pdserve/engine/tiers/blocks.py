"""One block of a KV pool as bytes: out of the pool and into it, also where the pool is on a GPU."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pdserve.core.layout import GroupLayout

Bytes = npt.NDArray[np.uint8]


class BlockBytes(Protocol):
    """Copies whole blocks of one pool. Used by one thread; every copy is complete when it returns."""

    @property
    def block_bytes(self) -> int: ...
    def read(self, block: int, into: Bytes) -> None: ...
    def write(self, block: int, data: Bytes) -> None: ...


class HostBlocks:
    """A pool in host memory. numpy copies with the GIL released."""

    def __init__(self, address: int, layout: GroupLayout, num_blocks: int) -> None:
        self.block_bytes = layout.block_bytes
        raw = (ctypes.c_uint8 * (num_blocks * self.block_bytes)).from_address(address)
        self._blocks = np.ctypeslib.as_array(raw).reshape(num_blocks, self.block_bytes)

    def read(self, block: int, into: Bytes) -> None:
        into[:] = self._blocks[block]

    def write(self, block: int, data: Bytes) -> None:
        self._blocks[block] = data


class DeviceBlocks:
    """A pool on a GPU, through pinned memory on a stream of its own. Not verified on a GPU.

    The caller gives blocks whose kernels have ended (they are cached only after their step), so no event of
    the compute stream is waited for.
    """

    def __init__(self, pool: torch.Tensor, layout: GroupLayout, num_blocks: int) -> None:
        self.block_bytes = layout.block_bytes
        self._blocks = pool.view(torch.uint8).view(num_blocks, self.block_bytes)
        self._pinned = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=True)
        self._stream: torch.cuda.Stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]  # torch

    def read(self, block: int, into: Bytes) -> None:
        with torch.cuda.stream(self._stream):
            self._pinned.copy_(self._blocks[block], non_blocking=True)
        self._stream.synchronize()
        into[:] = self._pinned.numpy()

    def write(self, block: int, data: Bytes) -> None:
        self._pinned.numpy()[:] = data
        with torch.cuda.stream(self._stream):
            self._blocks[block].copy_(self._pinned, non_blocking=True)
        self._stream.synchronize()
