"""What the leader and a follower say to each other: msgpack frames over a unix socket, nothing pickled."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Final, cast

import msgpack

from kvtransfer.protocol import NoteArrived, PeerConnected, PeerFailed, Push, PushEnded, TransferStopped
from pdserve.core.codec import from_fields, to_fields
from pdserve.core.errors import ProtocolError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.engine.batch import SequenceSlice


@dataclass(frozen=True, slots=True)
class Joining:
    """The first word of a follower."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class RankReady:
    """Its model is loaded and its pool registered."""

    metadata: bytes
    """For the ranks of peers."""


@dataclass(frozen=True, slots=True)
class Beat:
    """It lives."""


@dataclass(frozen=True, slots=True)
class Step:
    """Compute this, now, as the leader does."""

    slices: list[SequenceSlice]
    layer_groups: int | None
    """Groups of layers after which the ranks meet, because a push may read them; None: nothing is pushed."""


@dataclass(frozen=True, slots=True)
class SubmitOnRank:
    push: Push


@dataclass(frozen=True, slots=True)
class ConnectOnRank:
    peer: WorkerId
    epoch: int
    fingerprint: Fingerprint
    metadata: bytes


@dataclass(frozen=True, slots=True)
class DisconnectOnRank:
    peer: WorkerId
    epoch: int | None


@dataclass(frozen=True, slots=True)
class StopRank:
    """The worker ends."""


FromLeader = Step | SubmitOnRank | ConnectOnRank | DisconnectOnRank | StopRank
RankEvent = PushEnded | NoteArrived | PeerConnected | PeerFailed | TransferStopped
FromFollower = Joining | RankReady | Beat | RankEvent
Said = FromLeader | FromFollower

_TAGGED: Final[tuple[type, ...]] = (
    Joining,
    RankReady,
    Beat,
    Step,
    SubmitOnRank,
    ConnectOnRank,
    DisconnectOnRank,
    StopRank,
    PushEnded,
    NoteArrived,
    PeerConnected,
    PeerFailed,
    TransferStopped,
)
_TAG_OF: Final = {cls: tag for tag, cls in enumerate(_TAGGED)}
_LENGTH: Final = struct.Struct("<I")


class Link:
    """One side of the socket. Any thread may send; one receives."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._lock = connected, threading.Lock()

    def send(self, said: Said) -> None:
        """Raises OSError when the other side is gone, or takes nothing within the socket's timeout."""
        data = msgpack.packb([_TAG_OF[type(said)], to_fields(said)], use_bin_type=True)
        with self._lock:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Said | None:
        """None: the other side has closed. Raises `ProtocolError`, and OSError (TimeoutError in silence)."""
        head = self._exactly(_LENGTH.size)
        if head is None:
            return None
        data = self._exactly(_LENGTH.unpack(head)[0])
        if data is None:
            return None
        try:
            tag, fields = msgpack.unpackb(data, raw=False)
            return cast("Said", from_fields(_TAGGED[tag], fields))
        except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
            raise ProtocolError(f"a rank said what cannot be read: {error}") from error

    def set_timeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Wakes whoever receives. Safe to call twice."""
        with contextlib.suppress(OSError):  # the other side was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(count - len(parts))
            if not part:
                return None
            parts += part
        return bytes(parts)
