"""A safetensors file written piece by piece, for tensors that would not fit in memory together.

File format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from pdserve.core.errors import InvariantViolated

NAMES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class SafetensorsWriter:
    """Announce all tensors, then append each one's rows in that order. A context manager.

    Leaving the block without having written exactly what was announced raises `InvariantViolated`.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = dict(specs)
        self._left_bytes = sum(spec.size_bytes for spec in specs.values())
        self._file = path.open("wb")
        header = _header(self._specs)
        self._file.write(struct.pack("<Q", len(header)))
        self._file.write(header)

    def append(self, rows: Tensor) -> None:
        """Write the next rows of the current tensor; a CPU tensor of its dtype."""
        data = rows.contiguous().view(torch.uint8).numpy()
        self._left_bytes -= data.nbytes
        self._file.write(data.data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left_bytes != 0:
            raise InvariantViolated(f"{self._file.name}: {self._left_bytes} announced bytes were not written")


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.size_bytes
        shape: Sequence[int] = spec.shape
        entries[name] = {"dtype": NAMES[spec.dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)
