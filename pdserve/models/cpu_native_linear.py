"""bfloat16 projections on pdcpu's own kernels.

Activations are rounded to bfloat16, sums and results are float32. One product serves every number of rows: a
row's result has the same bits whatever other rows are multiplied with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Final

import torch
from pdcpu.library import Library, Weight
from torch import Tensor

CHUNK_BYTES: Final = 64 * 2**20
LINE: Final = 64


class Arena:
    """Memory for packed weights, in large pages where the system gives them: they are read from end to end in
    every step, and the prefetchers of a CPU stop at the end of a page."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes], at a cache line; the memory lives as long as some part of its chunk."""
        if self._used + size_bytes > self._chunk.numel():
            memory = mmap.mmap(-1, max(CHUNK_BYTES, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self._chunk, self._used = torch.frombuffer(memory, dtype=torch.uint8), 0
        taken = self._chunk[self._used : self._used + size_bytes]
        self._used += -(-size_bytes // LINE) * LINE
        return taken


class NativeLinear:
    """y = x @ weight.T + bias with float32 x and y; the weight is kept packed, once."""

    def __init__(self, library: Library, arena: Arena, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """weight_OI: bfloat16, rows of consecutive numbers; copied."""
        if weight_OI.stride(1) != 1:
            weight_OI = weight_OI.contiguous()
        outputs, inputs = weight_OI.shape
        self.shape = (outputs, inputs)
        self._library = library
        self._packed = arena.take(library.packed_bytes(outputs, inputs))
        self._bias = None if bias_O is None else bias_O.float().contiguous()
        library.pack(weight_OI.data_ptr(), weight_OI.stride(0), outputs, inputs, self._packed.data_ptr())
        self._work_row = library.padded_row(inputs)
        self.weight = Weight(
            self._packed.data_ptr(), None if self._bias is None else self._bias.data_ptr(), outputs, inputs
        )
        """For calls that take several weights; valid as long as this object."""
        self._reference = ctypes.byref(self.weight)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if x_TI.dtype != torch.float32 or x_TI.stride(1) != 1:
            x_TI = x_TI.float().contiguous()
        rows = x_TI.shape[0]
        out = torch.empty((rows, self.shape[0]))
        work = torch.empty(rows * self._work_row, dtype=torch.bfloat16)
        self._library.linear(
            self._reference, x_TI.data_ptr(), x_TI.stride(0), rows, out.data_ptr(), work.data_ptr()
        )
        return out

    def of_normed(self, x_TI: Tensor, norm_I: Tensor, eps: float) -> Tensor:
        """The product with RMSNorm(x); x contiguous float32, the norm as `CpuOps.vector` gives it."""
        rows = x_TI.shape[0]
        out = torch.empty((rows, self.shape[0]))
        work = torch.empty(rows * self._work_row, dtype=torch.bfloat16)
        self._library.norm_linear(
            self._reference, x_TI.data_ptr(), norm_I.data_ptr(), eps, rows, out.data_ptr(), work.data_ptr()
        )
        return out
