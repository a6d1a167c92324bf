"""A typed NIXL agent: the only file that imports NIXL, and that when the first agent is made.

It speaks to NIXL's bindings (`nixl_cu13._bindings`, the same in `nixl_cu12`) rather than to its Python class,
which would start a progress thread that spins on a core, and exports no way to pass UCX settings.

Two facts about UCX that this file knows:

- *Descriptors.* Each TCP interface of a UCX worker watches its sockets through one level-triggered epoll
  descriptor. Notifications between hosts and within one travel by TCP (unless there is RDMA), so such a
  descriptor tells that something has arrived, without a progress thread and without polling. They are found
  by what appears in /proc/self/fd while the backend is created: an epoll that watches nothing but sockets.
- *Counters.* TCP_INFO of those sockets counts the bytes they have sent: the proof of whether a write went by
  TCP or by a memory copy.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pdserve.core.errors import ConfigError, TransferError

DRAIN_POLLS: Final = 200
_TCP_INFO_BYTES_ACKED: Final = 120
"""Offset in Linux's struct tcp_info, since 4.1."""


class AgentError(TransferError):
    """NIXL refused or failed; the message is its own."""


class PeerDisconnected(AgentError):
    """The transport knows that the peer is gone."""


class State(Enum):
    DONE = "done"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Memory:
    """An allocation to register; `device` None is host memory."""

    address: int
    size_bytes: int
    device: int | None


class NixlAgent:
    """One NIXL agent with one UCX backend and no progress thread. Not thread-safe."""

    def __init__(self, name: str, *, ucx: Mapping[str, str]) -> None:
        """`ucx`: settings without their prefix; UCX_* variables of the process win over them."""
        self.name = name
        plain = ",".join(f"{key}={value}" for key, value in ucx.items() if "," not in value)
        options = {"engine_config": plain} if plain else {}
        self._nixl = load_nixl()
        self._failures = _failure_types(self._nixl)
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = False
        config.useListenThread = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_NONE
        with self._errors("create the agent"):
            self._agent = self._nixl.nixlAgent(name, config)
        before = _event_polls()
        lists = {f"UCX_{key}": value for key, value in ucx.items() if "," in value}
        with _environment(lists), self._errors("create the UCX backend (UCX says why on stderr)"):
            self._agent.createBackend("UCX", options)
        self.wake_fds: tuple[int, ...] = tuple(fd for fd in _event_polls() - before if _watches_sockets(fd))
        self._registered: list[Any] = []

    # --- memory -------------------------------------------------------------------------------------

    def register(self, memory: Memory) -> None:
        """Make an allocation reachable; it stays so until `close`."""
        row = [(memory.address, memory.size_bytes, memory.device or 0, "")]
        with self._errors(f"register {memory.size_bytes} bytes"):
            descriptors = self._nixl.nixlRegDList(self._segment(memory.device), row)
            self._agent.registerMem(descriptors)
        self._registered.append(descriptors)

    def prepare(self, peer: str | None, memory: Memory, unit_bytes: int) -> int:
        """Cut an allocation (a peer's, or ours for None) into units that `write` names by index.

        A strided description: its size here does not grow with the number of units.
        """
        count = memory.size_bytes // unit_bytes
        row = np.array([[memory.address, unit_bytes, memory.device or 0, unit_bytes, count]], dtype=np.uint64)
        with self._errors(f"prepare the pool of {peer or 'this worker'}"):
            handle: int = self._agent.prepXferDlist(
                self._nixl.NIXL_INIT_AGENT if peer is None else peer, self._segment(memory.device), row, []
            )
        return handle

    def unprepare(self, handle: int) -> None:
        with self._errors("release a prepared pool"):
            self._agent.releasedDlistH(handle)

    # --- peers --------------------------------------------------------------------------------------

    def metadata(self) -> bytes:
        """What `add_peer` on the other side takes; after everything is registered."""
        with self._errors("describe the agent"):
            data: bytes = self._agent.getLocalMD()
        return data

    def add_peer(self, metadata: bytes) -> str:
        """The peer's agent name."""
        with self._errors("load a peer's metadata"):
            name: bytes = self._agent.loadRemoteMD(metadata)
        return name.decode()

    def remove_peer(self, name: str) -> None:
        with self._errors(f"forget {name}"):
            self._agent.invalidateRemoteMD(name)

    # --- transfers ----------------------------------------------------------------------------------

    def write(
        self,
        local: int,
        local_units: npt.NDArray[np.int32],
        remote: int,
        remote_units: npt.NDArray[np.int32],
        note: bytes,
    ) -> int:
        """A write of units of one prepared pool into another's, neighbours merged. `post` starts it."""
        with self._errors("prepare a write"):
            handle: int = self._agent.makeXferReq(
                self._nixl.NIXL_WRITE, local, local_units, remote, remote_units, note, [], False
            )
        return handle

    def post(self, handle: int, note: bytes) -> State:
        """Start a write. Where the transport is a memory copy, it happens here, with the GIL released."""
        with self._errors("write"):
            return self._state(self._agent.postXferReq(handle, note))

    def state(self, handle: int) -> State:
        """Raises `PeerDisconnected` or `AgentError` when the write has failed."""
        with self._errors("write"):
            return self._state(self._agent.getXferStatus(handle))

    def release(self, handle: int) -> None:
        """Forget a write. One that is under way is NOT stopped by this."""
        with self._errors("release a write"):
            self._agent.releaseXferReq(handle)

    def notes(self) -> list[tuple[str, bytes]]:
        """Make progress, and return (agent name, note) of what has arrived."""
        with self._errors("take notes"):
            found: dict[str, list[bytes]] = self._agent.getNotifs({}, [])
        return [(name, note) for name, notes in found.items() for note in notes]

    def drain(self) -> list[tuple[str, bytes]]:
        """Progress until UCX has dealt with a dead endpoint; without it, destroying the agent aborts."""
        notes = []
        for _ in range(DRAIN_POLLS):
            notes += self.notes()
        return notes

    def tcp_bytes_sent(self) -> int | None:
        """Bytes that this agent's TCP sockets have sent so far; None when they cannot be counted."""
        if not self.wake_fds:
            return None
        sockets = {fd for epoll in self.wake_fds for fd in _watched(epoll)}
        return sum(_bytes_sent(fd) for fd in sockets)

    def close(self) -> None:
        """Destroy the agent. The caller has released its writes and prepared pools."""
        for descriptors in self._registered:
            with contextlib.suppress(AgentError), self._errors("deregister"):
                self._agent.deregisterMem(descriptors)
        self._registered.clear()
        self.wake_fds = ()
        del self._agent

    def _segment(self, device: int | None) -> Any:
        return self._nixl.DRAM_SEG if device is None else self._nixl.VRAM_SEG

    def _state(self, status: object) -> State:
        if status == self._nixl.NIXL_SUCCESS:
            return State.DONE
        if status == self._nixl.NIXL_IN_PROG:
            return State.RUNNING
        raise AgentError(f"NIXL: the write ended as {status}")

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Any:
        try:
            yield
        except self._nixl.nixlRemoteDisconnectError as error:
            raise PeerDisconnected(f"NIXL could not {doing}: {error}") from error
        except self._failures as error:
            raise AgentError(f"NIXL could not {doing}: {type(error).__name__}: {error}") from error


def load_nixl() -> ModuleType:
    """NIXL's bindings of whichever wheel is here. Raises `ConfigError` that says how to get one."""
    reasons = []
    for wheel in ("nixl_cu13", "nixl_cu12"):
        try:
            return importlib.import_module(f"{wheel}._bindings")
        except ImportError as error:
            reasons.append(f"{wheel}: {error}")
    raise ConfigError(f"NIXL cannot be imported ({'; '.join(reasons)}); pip install nixl-cu13")


def _failure_types(nixl: ModuleType) -> tuple[type[Exception], ...]:
    own = [v for k, v in vars(nixl).items() if k.startswith("nixl") and k.endswith("Error")]
    # pybind11 raises ValueError and IndexError for arguments, RuntimeError for C++ exceptions
    return (*own, ValueError, IndexError, RuntimeError, TypeError)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set what is not set yet, for a moment: NIXL splits its own options at commas, so that lists reach UCX
    by no other way."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _event_polls() -> set[int]:
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since, by another thread
            if os.readlink(f"/proc/self/fd/{entry}") == "anon_inode:[eventpoll]":
                found.add(int(entry))
    return found


def _watched(epoll_fd: int) -> list[int]:
    try:
        lines = Path(f"/proc/self/fdinfo/{epoll_fd}").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith("tfd:")]


def _watches_sockets(epoll_fd: int) -> bool:
    """True for the epoll of a TCP interface; UCX's own service thread watches pipes and epolls as well, an
    event loop that another thread makes meanwhile a unix socket."""
    for fd in _watched(epoll_fd):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode) or _family(fd) == socket.AF_UNIX:
                return False
        except OSError:
            return False
    return True


def _family(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as copy:
        return copy.family


def _bytes_sent(fd: int) -> int:
    try:
        with socket.socket(fileno=os.dup(fd)) as copy:
            info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0
    if len(info) < _TCP_INFO_BYTES_ACKED + 8:
        return 0
    (acked,) = struct.unpack_from("<Q", info, _TCP_INFO_BYTES_ACKED)
    return int(acked)
