"""The C heap between steps: glibc gives freed memory back to the kernel, and a step asks for it again.

A step's activations are tens of megabytes, allocated and freed layer by layer; page faults for them took up
to a fifth of a prefill step on a CPU.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_BYTES: Final = 256 * 2**20
_LARGEST_HEAP_PIECE: Final = 32 * 2**20
"""The most that glibc accepts on 64 bits."""


def keep_heap_between_steps() -> bool:
    """Give back what loading left behind, then let the heap keep up to 256 MiB that is free.

    For the whole process. False where the C library is not glibc: nothing is changed there.
    """
    libc = ctypes.CDLL(None)
    try:
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except AttributeError:
        return False
    malloc_trim(0)
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_PIECE))
