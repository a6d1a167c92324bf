"""A decode step whose index tensors have one place and one shape, so that a CUDA graph may hold the step.

Tokens, positions, slots, block tables and the split of attention lie in one int32 buffer on the device.
Before a step its contents are built in numpy, padded to the graph's rows, and sent by one asynchronous copy.
A padding row has token 0, no slot and no context: it writes nothing to the pool and its logits mean nothing.

Shape legend: R rows of the graph, M blocks of the longest context, C items of the attention plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pdserve.models.ops import SliceMeta

Ints = NDArray[np.int32]

ALIGN: Final = 4
"""Index tensors start on multiples of this many int32, 16 bytes: kernels are compiled for that."""


def graph_rows(rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the ascending `sizes` that holds so many rows; None where none does."""
    at = bisect_left(sizes, rows)
    return sizes[at] if rows and at < len(sizes) else None


@dataclass(frozen=True, slots=True)
class PackedInts:
    """Where each of several int32 arrays lies in one buffer."""

    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]
    total: int

    @staticmethod
    def of(shapes: dict[str, tuple[int, ...]]) -> PackedInts:
        starts, total = {}, 0
        for name, shape in shapes.items():
            starts[name] = total
            total += -(-math.prod(shape) // ALIGN) * ALIGN
        return PackedInts(shapes, starts, total)

    def fill(self, buffer: Ints, arrays: dict[str, Ints]) -> None:
        """Write every array to its place. Raises `ValueError` for one that is missing or of another shape."""
        for name, shape in self.shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, its place {shape}")
            start = self.starts[name]
            buffer[start : start + arrays[name].size] = arrays[name].ravel()


def padded_tables(slices: Sequence[SliceMeta], rows: int, width: int, block_tokens: int) -> Ints:
    """Block tables [R, M], of the blocks that hold a token."""
    tables_RM = np.zeros((rows, width), dtype=np.int32)
    for row, meta in enumerate(slices):
        count = meta.start // block_tokens + 1
        tables_RM[row, :count] = meta.blocks[:count]
    return tables_RM


def padded(values: Sequence[int] | Ints, rows: int, fill: int) -> Ints:
    """[R]"""
    out = np.full(rows, fill, dtype=np.int32)
    out[: len(values)] = values
    return out
