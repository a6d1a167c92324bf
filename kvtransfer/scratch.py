"""Memory for probes, of the same kind as the pools, and the check that a GPU pool can be shared fast."""

from __future__ import annotations

import ctypes
import importlib
from typing import Final

import numpy as np

from pdserve.core.errors import ConfigError

_CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: Final = 10


class Scratch:
    """`size_bytes` that anybody may write, on the host (device None) or on a CUDA device.

    The GPU branch is not verified on a GPU.
    """

    def __init__(self, size_bytes: int, device: int | None) -> None:
        self.device = device
        self._memory: object
        if device is None:
            array = np.zeros(size_bytes, dtype=np.uint8)
            self._memory, self.address = array, int(array.ctypes.data)
        else:
            torch = importlib.import_module("torch")
            tensor = torch.zeros(size_bytes, dtype=torch.uint8, device=f"cuda:{device}")
            self._memory, self.address = tensor, int(tensor.data_ptr())


def require_shareable(address: int, what: str) -> None:
    """Raise `ConfigError` when GPU memory comes from `expandable_segments`.

    Such memory cannot be opened by another process through CUDA IPC; transfers of it still work, several
    hundred times slower, and say nothing. Asks the CUDA driver; not verified on a GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"{what} is on a GPU, but the CUDA driver cannot be loaded: {error}") from error
    capable = ctypes.c_uint(0)
    status = driver.cuPointerGetAttribute(
        ctypes.byref(capable), _CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, ctypes.c_uint64(address)
    )
    if status != 0:
        raise ConfigError(f"{what} at {address:#x} is not GPU memory (CUDA error {status})")
    if not capable.value:
        raise ConfigError(
            f"{what} was allocated with expandable_segments, which makes transfers hundreds of times slower; "
            "remove expandable_segments from PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF)"
        )
