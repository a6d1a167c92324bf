"""What others reach over the same link in the same run: UCX's own ucx_perftest, and iperf3."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.network_namespaces import ADDRESSES, within

_PORT: Final = 13417
_START_S: Final = 0.5
_TIMEOUT_S: Final = 60.0


def ucx_perftest(
    program: str, size: int, total_bytes: int, ucx: Mapping[str, str], namespaces: tuple[str, str] | None
) -> float | None:
    """GB/s of `ucp_put_bw`, messages of `size` bytes from one buffer into one. None: not installed."""
    if shutil.which(program) is None:
        return None
    env = {**os.environ, **{f"UCX_{key}": value for key, value in ucx.items()}}
    sides = [[], []] if namespaces is None else [within(name) for name in namespaces]
    host = "127.0.0.1" if namespaces is None else ADDRESSES[1]
    rounds = str(max(total_bytes // size, 100))
    test = ["-t", "ucp_put_bw", "-s", str(size), "-n", rounds, "-w", "20", "-f"]
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
