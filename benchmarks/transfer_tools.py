"""What others reach over the same link in the same run: the kernel's own copy, ucx_perftest and iperf3."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.network_namespaces import ADDRESSES, within
from kvtransfer.protocol import Path


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_IOV_MAX: Final = 1024
_PORT: Final = 13417
_START_S: Final = 0.5
_TIMEOUT_S: Final = 60.0


def write_into(pid: int, spans: Sequence[tuple[int, int, int]]) -> None:
    """`process_vm_writev`: copy (address here, address there, length) into another process of this user.

    What UCX does over shared memory where the pools are each process's own, without anything around it.
    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_writev.restype = ctypes.c_ssize_t
    for begin in range(0, len(spans), _IOV_MAX):
        part = spans[begin : begin + _IOV_MAX]
        count = len(part)
        here = (_IoVec * count)(*(_IoVec(src, length) for src, _, length in part))
        there = (_IoVec * count)(*(_IoVec(dst, length) for _, dst, length in part))
        wanted = sum(length for _, _, length in part)
        args = (
            ctypes.c_int(pid),
            here,
            ctypes.c_ulong(count),
            there,
            ctypes.c_ulong(count),
            ctypes.c_ulong(0),
        )
        if libc.process_vm_writev(*args) != wanted:
            raise OSError(ctypes.get_errno(), "process_vm_writev copied a part")


def ucx_perftest(
    program: str,
    size: int,
    total_bytes: int,
    ucx: Mapping[str, str],
    namespaces: tuple[str, str] | None,
    path: Path,
) -> float | None:
    """GB/s of messages of `size` bytes from one buffer into one, over the transport that pushes take.

    Over shared memory that is `cma` (UCX would pick memory of its own that both sides map, which pools are
    not), elsewhere what UCX picks. None: not installed.
    """
    if shutil.which(program) is None:
        return None
    env = {**os.environ, **{f"UCX_{key}": value for key, value in ucx.items()}}
    sides = [[], []] if namespaces is None else [within(name) for name in namespaces]
    host = "127.0.0.1" if namespaces is None else ADDRESSES[1]
    rounds = str(max(total_bytes // size, 100))
    which = ["put_bw", "-d", "memory", "-x", "cma", "-D", "zcopy"] if path is Path.SHM else ["ucp_put_bw"]
    test = ["-t", *which, "-s", str(size), "-n", rounds, "-w", "20", "-f"]
    server = _start([*sides[1], program, "-p", str(_PORT)], env)
    try:
        time.sleep(_START_S)  # it says nothing when it is ready
        client = [*sides[0], program, host, "-p", str(_PORT), *test]
        output = _output(client, env)
    finally:
        server.kill()
        server.wait()
    # iterations, overhead or percentile, average and overall latency, average and overall MiB/s, ...
    numbers = re.findall(r"^\s*\d+((?:\s+[\d.]+){7})\s*$", output, re.MULTILINE)
    return float(numbers[-1].split()[4]) * (1 << 20) / 1e9 if numbers else None


def iperf3(namespaces: tuple[str, str], seconds: int) -> float | None:
    """GB/s of one TCP stream between two namespaces. None: not installed."""
    if shutil.which("iperf3") is None:
        return None
    server = _start([*within(namespaces[1]), "iperf3", "-s", "-1"], os.environ)
    try:
        time.sleep(_START_S)
        client = [*within(namespaces[0]), "iperf3", "-c", ADDRESSES[1], "-t", str(seconds), "-J"]
        result = json.loads(_output(client, os.environ))
    finally:
        server.kill()
        server.wait()
    return float(result["end"]["sum_received"]["bits_per_second"]) / 8e9


def _start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=dict(env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _output(command: Sequence[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, env=dict(env), capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
    )
    return done.stdout
