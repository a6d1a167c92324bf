"""How the bytes of a push become 64 bits: XXH3 over host memory, a kernel where the pools are on a GPU.

Both read the pieces of a push in one order, so neither side needs the other's layout; the two kinds do not
compare with each other, and a note says which one its digest is.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvtransfer.geometry import Selection
from kvtransfer.protocol import PoolRegion

if TYPE_CHECKING:
    from torch import Tensor

_CALIBRATION_BYTES: Final = 16 << 20
_CALIBRATION_ROUNDS: Final = 3
_UNIT_BYTES: Final = 16
_MASK: Final = (1 << 64) - 1

Bytes = npt.NDArray[np.uint8]


class Digest(Protocol):
    """Of one push, fed piece by piece as they are sent."""

    @property
    def kind(self) -> str: ...
    def add(self, group: int, selection: Selection) -> None: ...
    def value(self) -> int:
        """64 bits; may wait for the device."""
        ...


class Digester(Protocol):
    """Makes the digests of one worker's pools."""

    @property
    def kind(self) -> str: ...
    def start(self) -> Digest: ...
    def gb_per_s(self) -> float:
        """How fast it is here and now, over a pool that is mostly not in a cache."""
        ...


class HostDigester:
    """XXH3, 64 bits; releases the GIL."""

    kind: Final = "xxh3"

    def __init__(self, regions: Sequence[PoolRegion]) -> None:
        self.pools = [memory(region) for region in regions]

    def start(self) -> Digest:
        return _HostDigest(self.pools)

    def gb_per_s(self) -> float:
        sample = self.pools[0][:_CALIBRATION_BYTES]
        return _rate(len(sample), lambda: xxhash.xxh3_64_intdigest(sample.data))


class _HostDigest:
    kind: Final = HostDigester.kind

    def __init__(self, pools: Sequence[Bytes]) -> None:
        self._pools, self._hash = pools, xxhash.xxh3_64()

    def add(self, group: int, selection: Selection) -> None:
        pool = self._pools[group]
        for offset, length in selection.pieces():
            self._hash.update(pool[offset : offset + length].data)

    def value(self) -> int:
        return self._hash.intdigest()


class SumDigester:
    """`pdkernels.digest` over pools seen as 32-bit words. Not verified on a GPU: only the kernel's arithmetic
    is, under Triton's interpreter, and everything around it with the kernel's reference."""

    kind: Final = "sum64"

    def __init__(
        self, words: Sequence[Tensor], compute: Callable[[Tensor, Tensor, int], Tensor], torch: Any
    ) -> None:
        """words: int32 [n] per pool. compute: `pdkernels.digest.digest_pieces`."""
        self.words, self._compute, self._torch = tuple(words), compute, torch

    def start(self) -> Digest:
        return _SumDigest(self)

    def gb_per_s(self) -> float:
        length = min(self.words[0].numel() * 4, _CALIBRATION_BYTES) // _UNIT_BYTES
        return _rate(length * _UNIT_BYTES, lambda: int(self.sums(0, [(0, length, 0)])))

    def sums(self, group: int, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
        """The sum over pieces (begin in the pool, length, begin in the push; in 16 bytes), on the device."""
        words = self.words[group]
        table = self._torch.tensor(pieces, dtype=self._torch.int64).T.contiguous().to(words.device)
        return self._compute(words, table, max(length for _, length, _ in pieces)).sum()


class _SumDigest:
    kind: Final = SumDigester.kind

    def __init__(self, digester: SumDigester) -> None:
        self._digester, self._place = digester, 0
        self._parts: list[Tensor] = []

    def add(self, group: int, selection: Selection) -> None:
        pieces = []
        for offset, length in selection.pieces():
            pieces.append((offset // _UNIT_BYTES, length // _UNIT_BYTES, self._place))
            self._place += length // _UNIT_BYTES
        if pieces:
            self._parts.append(self._digester.sums(group, pieces))

    def value(self) -> int:
        return sum(int(part) for part in self._parts) & _MASK


def make_digester(regions: Sequence[PoolRegion]) -> tuple[Digester | None, str]:
    """The digester of these pools; or None, and why there is none."""
    if all(region.device is None for region in regions):
        return HostDigester(regions), ""
    if any(region.layout.group.token_head_bytes % _UNIT_BYTES for region in regions):
        return None, f"a head's {_UNIT_BYTES} bytes do not divide its rows"
    try:
        kernels, torch = importlib.import_module("pdkernels.digest"), importlib.import_module("torch")
    except ImportError as error:
        return None, f"it takes Triton: {error}"
    if not torch.cuda.is_available():
        return None, "PyTorch finds no GPU"
    words = [torch.as_tensor(_OnDevice(region), device=f"cuda:{region.device}") for region in regions]
    return SumDigester(words, kernels.digest_pieces, torch), ""


class _OnDevice:
    """Memory on a GPU, as PyTorch takes it over without a copy (the CUDA array interface, version 3)."""

    def __init__(self, region: PoolRegion) -> None:
        self.__cuda_array_interface__ = {
            "shape": (region.size_bytes // 4,),
            "typestr": "<i4",
            "data": (region.address, False),
            "version": 3,
        }


def memory(region: PoolRegion) -> Bytes:
    """A pool in host memory as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.size_bytes).from_address(region.address))


def _rate(size_bytes: int, run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_CALIBRATION_ROUNDS):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return size_bytes / max(best, 1e-9) / 1e9
