"""Whether the bytes that arrived are those that were sent: a digest of each push, carried with its note.

The sender reads its blocks before they are written, the receiver after the note, both on their transfer
threads and in the same order of bytes (`geometry`), so that neither needs the other's layout. xxHash (XXH3,
64 bits) releases the GIL. It finds what goes wrong by accident, a faulty link or a block reused too early; it
is no protection against somebody who forges pushes.

Pools on a GPU are read there, by a kernel (`digests`). Between one of each kind nothing is verified.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgpack

from kvtransfer.digests import Digest, Digester, make_digester
from kvtransfer.geometry import Route, Selection
from kvtransfer.protocol import NoteArrived, PathInfo, PoolRegion, Push
from kvtransfer.spans import require_blocks
from pdserve.core.errors import TransferError
from pdserve.core.ids import WorkerId
from pdserve.core.transfer_settings import Verify

log = logging.getLogger(__name__)

MAX_SHARE: Final = 0.02
"""`Verify.AUTO` verifies a pair's pushes where a digest takes at most this share of their time."""


@dataclass(frozen=True, slots=True)
class Landed:
    """An envelope, opened: the note inside, and where its bytes are if there is a digest to compare."""

    note: bytes
    digest: int | None
    group: int
    selection: Selection | None
    kind: str = ""
    """Of the digest; see `digests`."""


class Verifier:
    """One worker's side: makes digests of what it sends, and compares those of what it receives."""

    def __init__(self, regions: Sequence[PoolRegion], mode: Verify, digester: Digester | None = None) -> None:
        """digester: None makes the one that fits the pools."""
        self._regions, self._mode = tuple(regions), mode
        self._digester = digester
        if digester is None and mode is not Verify.OFF:
            self._digester, why = make_digester(regions)
            if why:
                log.warning("KV is not verified, transfer.verify has no effect on this worker: %s", why)
        self._hash_gb_per_s: float | None = None
        self._told: set[WorkerId] = set()

    def digest(self, peer: WorkerId, path: PathInfo) -> Digest | None:
        """An empty digest for a push to `peer`; None where pushes to it are not verified."""
        if self._digester is None:
            return None
        share = self._share(self._digester, path)
        verified = self._mode is Verify.ON or (self._mode is Verify.AUTO and share <= MAX_SHARE)
        if self._mode is Verify.AUTO and peer not in self._told:
            self._told.add(peer)
            log.info(
                "pushes to %s are %s: a digest takes %.1f%% of their time (transfer.verify)",
                peer,
                "verified" if verified else "not verified",
                100 * share,
            )
        return self._digester.start() if verified else None

    def add(self, digest: Digest, push: Push, route: Route) -> None:
        digest.add(push.group, route.source(push))

    def open(self, event: NoteArrived) -> NoteArrived:
        """The note that was put into an envelope. Its `error` is set when the bytes are not those sent."""
        try:
            landed = open_envelope(event.note, self._regions)
            digester = self._digester
            if landed.selection is None or digester is None or digester.kind != landed.kind:
                return NoteArrived(peer=event.peer, note=landed.note)
            require_blocks(0, "destination", landed.selection.blocks, self._regions[landed.group].num_blocks)
        except TransferError as error:
            return NoteArrived(peer=event.peer, note=b"", error=str(error))
        digest = digester.start()
        digest.add(landed.group, landed.selection)
        if digest.value() == landed.digest:
            return NoteArrived(peer=event.peer, note=landed.note)
        wrong = f"digest {digest.value():016x} of what arrived, {landed.digest:016x} of what was sent"
        return NoteArrived(peer=event.peer, note=landed.note, error=wrong)

    def _share(self, digester: Digester, path: PathInfo) -> float:
        """Of a push's time. A pair whose speed is not known counts as slow: it is verified."""
        if path.gigabytes_per_s is None or self._mode is not Verify.AUTO:
            return 0.0
        if self._hash_gb_per_s is None:
            self._hash_gb_per_s = digester.gb_per_s()
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
            digest.kind,
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
        digest, group, blocks, first_token, num_grains, grain_tokens, layers, heads, kind = rest
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
        return Landed(note, digest, group, selection, kind)
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise TransferError(f"a note's envelope of {len(data)} bytes cannot be read: {error}") from error


def _packed(fields: list[object]) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed
