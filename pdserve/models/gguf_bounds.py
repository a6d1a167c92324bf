"""Whether the lengths in a GGUF header can be true, looked at before anything is built from them.

The reader of the `gguf` package believes every length: a damaged one makes it collect values from beyond the
end of the file until memory is gone. The layout is GGUF's: magic, version, counts, then key-value pairs.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

_MAGIC: Final = b"GGUF"
_SCALAR_BYTES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""By type: 8- to 64-bit integers, 32- and 64-bit floats, and truth values."""
_STRING, _ARRAY = 8, 9
_MAX_DEPTH: Final = 4
_MAX_ELEMENTS: Final = 2**24
"""Of one array; the longest that are written are vocabularies."""
_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8
"""Of a tensor's entry at least: name's length, dimensions, one of them, type, offset."""
_PAIR_BYTES: Final = 8 + 4 + 1


def check_lengths(path: Path) -> None:
    """Raises ValueError for a length that cannot be, OSError for a file that cannot be mapped."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._order = data, 0, "<"

    def header(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("no GGUF magic")
        version = self._number("I")
        if version & 0xFFFF == 0:  # written by a big-endian machine
            self._order = ">"
        tensors, pairs = self._number("Q"), self._number("Q")
        self._require(tensors * _TENSOR_BYTES + pairs * _PAIR_BYTES, f"{tensors} tensors and {pairs} keys")
        for _ in range(pairs):
            self._string()
            self._value(self._number("I"), depth=0)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SCALAR_BYTES:
            self._take(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            self._array(depth)
        else:
            raise ValueError(f"value of type {kind} in depth {depth}")

    def _array(self, depth: int) -> None:
        kind, count = self._number("I"), self._number("Q")
        if count > _MAX_ELEMENTS:
            raise ValueError(f"array of {count} elements")
        if kind in _SCALAR_BYTES:
            self._take(count * _SCALAR_BYTES[kind])
            return
        self._require(count * 8, f"array of {count} elements")
        for _ in range(count):
            self._value(kind, depth + 1)

    def _string(self) -> None:
        self._take(self._number("Q"))

    def _number(self, code: str) -> int:
        value: int = struct.unpack(self._order + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _take(self, count: int) -> bytes:
        self._require(count, f"{count} bytes")
        self._at += count
        return self._data[self._at - count : self._at] if count <= 8 else b""

    def _require(self, count: int, what: str) -> None:
        left = len(self._data) - self._at
        if count > left:
            raise ValueError(f"{what} at byte {self._at}, where {left} bytes are left")
