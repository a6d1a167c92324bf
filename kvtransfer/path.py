"""Which way the bytes to a peer really go, and how fast: measured, not guessed from settings.

A probe writes from this worker's scratch memory into the peer's: 4 KiB a few times (the first sets up the
connection and is not counted), then 1 MiB a few times. Bytes that appear in the TCP sockets' own counters
went by TCP. What did not must have gone by a copy within the host or by RDMA, depending on whether both
workers run under one kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Final

import numpy as np

from kvtransfer.nixl_agent import NixlAgent, State
from kvtransfer.protocol import Path, PathInfo

SMALL_BYTES: Final = 4096
LARGE_BYTES: Final = 1 << 20
_SMALL: Final = np.zeros(1, dtype=np.int32)
_LARGE: Final = np.arange(LARGE_BYTES // SMALL_BYTES, dtype=np.int32)
_ROUNDS: Final = (_SMALL, _SMALL, _SMALL, _SMALL, _LARGE, _LARGE, _LARGE)
_FIRST_LARGE: Final = 4


def host_identity() -> str:
    """Equal in processes that run under one kernel, containers included."""
    try:
        return File("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def has_rdma() -> bool:
    """Whether this host has a device for RDMA."""
    devices = File("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def slow_path(path: Path, *, same_host: bool, both_rdma: bool, ucx: Mapping[str, str]) -> str:
    """Why a pair's path is worse than it ought to be, and what to do about it; empty where it is not."""
    if path is not Path.TCP or ucx.get("TLS", "").strip() == "tcp":
        return ""
    if same_host:
        return (
            "KV goes by TCP although both workers run on this host: they may not write each other's memory. "
            "Run them as one user, in containers with SYS_PTRACE or one PID namespace"
        )
    if both_rdma:
        return (
            "KV goes by TCP although both hosts have RDMA: check the link, UCX_NET_DEVICES and UCX_TLS, and "
            "in containers that /dev/infiniband is there and memory may be locked"
        )
    return ""


class Probe:
    """A few writes to one peer, made without blocking. `step` raises what the agent raises.

    TCP traffic to other peers meanwhile is counted as this probe's; workers meet before they serve.
    """

    def __init__(
        self,
        agent: NixlAgent,
        local_scratch: int,
        remote_scratch: int,
        *,
        same_host: bool,
        on_device: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._agent, self._local, self._remote = agent, local_scratch, remote_scratch
        self._same_host, self._on_device, self._clock = same_host, on_device, clock
        self._round = 0
        self._handle: int | None = None
        self._began = 0.0
        self._seconds: list[float] = []
        self._tcp_before: int | None = None

    def step(self) -> PathInfo | None:
        """Go on as far as possible without waiting; the result once all rounds are done."""
        while self._round < len(_ROUNDS):
            if self._handle is None:
                running = self._start_round()
            else:
                running = self._agent.state(self._handle) is State.RUNNING
            if running:
                return None
            self._seconds.append(self._clock() - self._began)
            self._release()
            self._round += 1
        return self._result()

    def abandon(self) -> int | None:
        """Give up. The write that is still under way, if any, for the caller to see to its end."""
        handle, self._handle = self._handle, None
        return handle

    def unmeasured(self) -> PathInfo:
        """What can be said without a finished probe: nothing."""
        return PathInfo(path=Path.UNKNOWN)

    def _start_round(self) -> bool:
        if self._round == _FIRST_LARGE:
            self._tcp_before = self._agent.tcp_bytes_sent()
        chosen = _ROUNDS[self._round]
        self._handle = self._agent.write(self._local, chosen, self._remote, chosen, b"")
        self._began = self._clock()
        return self._agent.post(self._handle, b"") is State.RUNNING

    def _release(self) -> None:
        if self._handle is not None:
            self._agent.release(self._handle)
            self._handle = None

    def _result(self) -> PathInfo:
        return PathInfo(
            path=self._path(),
            gigabytes_per_s=LARGE_BYTES / min(self._seconds[_FIRST_LARGE:]) / 1e9,
            latency_s=min(self._seconds[1:_FIRST_LARGE]),
        )

    def _path(self) -> Path:
        sent = self._agent.tcp_bytes_sent()
        large = LARGE_BYTES * (len(_ROUNDS) - _FIRST_LARGE)
        if sent is not None and self._tcp_before is not None and sent - self._tcp_before >= large // 2:
            return Path.TCP
        if self._same_host:
            return Path.CUDA_IPC if self._on_device else Path.SHM
        # Nothing was counted: RDMA, unless there was nothing to count with.
        return Path.UNKNOWN if sent is None else Path.RDMA
