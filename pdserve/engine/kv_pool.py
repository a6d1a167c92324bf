"""The KV cache of one group: a single plain allocation, cut into blocks (geometry in `core.layout`)."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.core.layout import GroupLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class KVPool:
    """[block, layer, K/V, kv_head, token, head_dim], contiguous, never moved and never resized.

    Allocated once and zeroed: unwritten rows must be finite, for attention multiplies them by a weight of
    zero. On a CPU the operating system gives the pages as they are first written.
    """

    def __init__(self, layout: GroupLayout, num_blocks: int, device: str | torch.device) -> None:
        if num_blocks < 1:
            raise ConfigError(
                f"the KV pool would hold {num_blocks} blocks of {layout.block_bytes} bytes: give "
                "cache.memory_gib or cache.num_blocks more"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        dtype = TORCH_DTYPES[layout.group.dtype]
        shape = layout.pool_shape(num_blocks)
        self.tensor: Tensor
        if self.device.type == "cpu":
            # Straight from the kernel: `torch.zeros` would write, and so occupy, all of it now.
            memory = mmap.mmap(-1, self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # A transfer by shared memory looks up each page: with large ones it is twice as fast.
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            self.tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=self.device)

    @property
    def address(self) -> int:
        """Of the first byte, as a transfer backend registers it."""
        return self.tensor.data_ptr()

    @property
    def size_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes
