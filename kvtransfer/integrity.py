"""Whether the bytes that arrived are those that were sent: a digest of each push, carried with its note.

The sender reads its blocks before they are written, the receiver after the note, both on their transfer
threads and in the same order of bytes (`geometry`), so that neither needs the other's layout. xxHash (XXH3,
64 bits) releases the GIL. It finds what goes wrong by accident, a faulty link or a block reused too early; it
is no protection against somebody who forges pushes.

Pools on a GPU are not verified: that takes a kernel which reads them there.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from kvtransfer.geometry import Route, Selection
from kvtransfer.protocol import NoteArrived, PathInfo, PoolRegion, Push
from kvtransfer.spans import require_blocks
from pdserve.core.config import Verify
from pdserve.core.errors import TransferError
from pdserve.core.ids import WorkerId

log = logging.getLogger(__name__)

MAX_SHARE: Final = 0.02
"""`Verify.AUTO` verifies a pair's pushes where a digest takes at most this share of their time."""
_CALIBRATION_BYTES: Final = 16 << 20
_CALIBRATION_ROUNDS: Final = 3

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Landed:
    """An envelope, opened: the note inside, and where its bytes are if there is a digest to compare."""

    note: bytes
    digest: int | None
    group: int
    selection: Selection | None


class Digest:
    """Of one push, fed piece by piece as they are sent."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, pool: Bytes, selection: Selection) -> None:
        for offset, length in selection.pieces():
            self._hash.update(pool[offset : offset + length].data)

    def value(self) -> int:
        return self._hash.intdigest()


class Verifier:
    """One worker's side: makes digests of what it sends, and compares those of what it receives."""

    def __init__(self, regions: Sequence[PoolRegion], mode: Verify) -> None:
        self._regions = tuple(regions)
        on_device = any(region.device is not None for region in regions)
        if on_device and mode is not Verify.OFF:
            log.warning("KV in GPU memory is not verified: transfer.verify has no effect on this worker")
        self._mode = Verify.OFF if on_device else mode
        self._pools = [] if self._mode is Verify.OFF else [memory(region) for region in regions]
        self._hash_gb_per_s: float | None = None
        self._told: set[WorkerId] = set()

    def digest(self, peer: WorkerId, path: PathInfo) -> Digest | None:
        """An empty digest for a push to `peer`; None where pushes to it are not verified."""
        share = self._share(path)
        verified = self._mode is Verify.ON or (self._mode is Verify.AUTO and share <= MAX_SHARE)
        if self._mode is Verify.AUTO and peer not in self._told:
            self._told.add(peer)
            log.info(
                "pushes to %s are %s: a digest takes %.1f%% of their time (transfer.verify)",
                peer,
                "verified" if verified else "not verified",
                100 * share,
            )
        return Digest() if verified else None

    def add(self, digest: Digest, push: Push, route: Route) -> None:
        digest.add(self._pools[push.group], route.source(push))

    def open(self, event: NoteArrived) -> NoteArrived:
        """The note that was put into an envelope. Its `error` is set when the bytes are not those sent."""
        try:
            landed = open_envelope(event.note, self._regions)
            if landed.selection is None or self._mode is Verify.OFF:
                return NoteArrived(peer=event.peer, note=landed.note)
            require_blocks(0, "destination", landed.selection.blocks, self._regions[landed.group].num_blocks)
        except TransferError as error:
            return NoteArrived(peer=event.peer, note=b"", error=str(error))
        digest = Digest()
        digest.add(self._pools[landed.group], landed.selection)
        if digest.value() == landed.digest:
            return NoteArrived(peer=event.peer, note=landed.note)
        wrong = f"digest {digest.value():016x} of what arrived, {landed.digest:016x} of what was sent"
        return NoteArrived(peer=event.peer, note=landed.note, error=wrong)

    def _share(self, path: PathInfo) -> float:
        """Of a push's time. A pair whose speed is not known counts as slow: it is verified."""
        if path.gigabytes_per_s is None or self._mode is not Verify.AUTO:
            return 0.0
        if self._hash_gb_per_s is None:
            self._hash_gb_per_s = _hash_rate(self._pools[0])
        return path.gigabytes_per_s / self._hash_gb_per_s


def seal(push: Push, route: Route | None, digest: Digest | None) -> bytes:
    """A push's note in its envelope, which says what was written where, if there is a digest of it."""
    if digest is None or route is None:
        return _packed([push.note])
    where = route.destination(push)
    return _packed(
        [
            push.note,
            digest.value(),
            push.group,
            where.blocks,
            where.first_token,
            where.num_grains,
            where.grain_tokens,
            where.layers,
            where.heads,
        ]
    )


def open_envelope(data: bytes, regions: Sequence[PoolRegion]) -> Landed:
    """Raises `TransferError` for bytes that `seal` did not make, or that do not fit the pools."""
    try:
        note, *rest = msgpack.unpackb(data)
        if not isinstance(note, bytes):
            raise TypeError(f"a note is {type(note).__name__}")
        if not rest:
            return Landed(note, None, 0, None)
        digest, group, blocks, first_token, num_grains, grain_tokens, layers, heads = rest
        if not 0 <= group < len(regions) or not all(type(block) is int for block in blocks):
            raise ValueError(f"group {group!r} or its blocks")
        selection = Selection(
            layout=regions[group].layout,
            blocks=tuple(blocks),
            first_token=first_token,
            num_grains=num_grains,
            grain_tokens=grain_tokens,
            layers=(layers[0], layers[1]),
            heads=(heads[0], heads[1]),
        )
        selection.require()
        return Landed(note, digest, group, selection)
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise TransferError(f"a note's envelope of {len(data)} bytes cannot be read: {error}") from error


def _packed(fields: list[object]) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def memory(region: PoolRegion) -> Bytes:
    """A pool in host memory as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.size_bytes).from_address(region.address))


def _hash_rate(pool: Bytes) -> float:
    """GB/s of a digest here and now, over a pool that is mostly not in a cache."""
    sample = pool[:_CALIBRATION_BYTES]
    best = float("inf")
    for _ in range(_CALIBRATION_ROUNDS):
        began = time.perf_counter()
        xxhash.xxh3_64_intdigest(sample.data)
        best = min(best, time.perf_counter() - began)
    return len(sample) / max(best, 1e-9) / 1e9
