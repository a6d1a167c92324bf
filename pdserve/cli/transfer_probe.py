"""Moves one block between two processes the way workers do, and says which path it took.

The two are siblings, as workers are: the kernel may let a parent read its child's memory and still forbid it
between siblings. They are processes of their own also because a transport that breaks may take them down.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtransfer.factory import make_backend
from kvtransfer.protocol import (
    NoteArrived,
    PathInfo,
    PeerConnected,
    PeerFailed,
    PoolRegion,
    Push,
    PushEnded,
    TransferBackend,
    TransferEvent,
)
from pdserve.core.errors import PdServeError, TransferError, TransferTimeout
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout
from pdserve.core.transfer_settings import TransferBackendName

_SENDER: Final = WorkerId("doctor-sender")
_RECEIVER: Final = WorkerId("doctor-receiver")
_LAYOUT: Final = GroupLayout(
    group=CacheGroup(name="full", num_layers=2, num_kv_heads=2, head_dim=64, dtype="bfloat16"),
    block_tokens=64,
)
_FINGERPRINT: Final = Fingerprint(protocol=PROTOCOL_VERSION, model="doctor", layouts=(_LAYOUT,))
_NOTE: Final = b"one block"
_IDLE_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class _Failed:
    why: str


def probe_transfer(timeout_s: float) -> PathInfo:
    """Move a block between two new processes over NIXL. Raises `TransferError` with what went wrong."""
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for role in (_SENDER, _RECEIVER):
        ours, theirs = context.Pipe()
        child = context.Process(target=_take_part, args=(role, theirs, timeout_s), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    deadline = time.monotonic() + timeout_s
    try:
        sender, receiver = pipes
        sender_metadata = _ask(sender, deadline, "start the sender")
        receiver_metadata = _ask(receiver, deadline, "start the receiver")
        receiver.send(sender_metadata)
        sender.send(receiver_metadata)
        path = _ask(sender, deadline, "write a block")
        _ask(receiver, deadline, "find the block written")
        if not isinstance(path, PathInfo):
            raise TransferError(f"the sender answered {path!r}")
        return path
    finally:
        for child in children:
            child.kill()
            child.join()


def _ask(pipe: multiprocessing.connection.Connection, deadline: float, what: str) -> object:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise TransferTimeout(what, 0.0)
    try:
        answer: object = pipe.recv()
    except EOFError:
        raise TransferError(f"could not {what}: the process died") from None
    if isinstance(answer, _Failed):
        raise TransferError(f"could not {what}: {answer.why}")
    return answer


def _take_part(role: WorkerId, pipe: multiprocessing.connection.Connection, timeout_s: float) -> None:
    """One of the two processes."""
    fill = 7 if role == _SENDER else 0
    pool = np.full(_LAYOUT.block_bytes, fill, dtype=np.uint8)
    region = PoolRegion(
        address=int(pool.ctypes.data), size_bytes=pool.nbytes, layout=_LAYOUT, num_blocks=1, device=None
    )
    try:
        backend = make_backend(TransferBackendName.NIXL, role, 1, [region], _FINGERPRINT)
        pipe.send(backend.metadata)
        peer_metadata = pipe.recv()
        peer = _RECEIVER if role == _SENDER else _SENDER
        backend.connect(peer, 1, _FINGERPRINT, peer_metadata)
        deadline = time.monotonic() + timeout_s
        if role == _SENDER:
            _await(backend, PeerConnected, deadline)
            backend.submit(
                Push(
                    id=1,
                    peer=peer,
                    group=0,
                    src_blocks=(BlockId(0),),
                    dst_blocks=(BlockId(0),),
                    layers=(0, _LAYOUT.group.num_layers),
                    note=_NOTE,
                    deadline=deadline,
                )
            )
            _await(backend, PushEnded, deadline)
            pipe.send(backend.path(peer))
        else:
            _await(backend, NoteArrived, deadline)
            right = bool((pool == 7).all())
            pipe.send("right" if right else _Failed("the bytes that arrived are not the bytes sent"))
        _keep_answering(backend, pipe)
    except PdServeError as error:
        pipe.send(_Failed(str(error)))


def _await(backend: TransferBackend, wanted: type[TransferEvent], deadline: float) -> None:
    while (now := time.monotonic()) < deadline:
        for event in backend.poll(now):
            if isinstance(event, PeerFailed) or (isinstance(event, PushEnded) and event.error):
                raise TransferError(event.error)
            if isinstance(event, wanted):
                return
        multiprocessing.connection.wait([*backend.wake_fds], timeout=_IDLE_S)
    raise TransferTimeout(f"waiting for {wanted.__name__}", 0.0)


def _keep_answering(backend: TransferBackend, pipe: multiprocessing.connection.Connection) -> None:
    """The peer may still need this side to make progress; whoever started us ends us."""
    while not pipe.poll(_IDLE_S):
        backend.poll(time.monotonic())
