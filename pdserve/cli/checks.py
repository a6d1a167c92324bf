"""What `pdserve doctor` looks at: each check says what it found and, when that is a problem, what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import psutil

from pdserve.core.config import ServeConfig
from pdserve.core.errors import PdServeError

GIB: Final = 1024**3
_MIN_SHM_BYTES: Final = GIB // 2
_MIN_OPEN_FILES: Final = 4096


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check's outcome. `advice` says what to do; empty when there is nothing to do."""

    check: str
    status: Status
    found: str
    advice: str = ""


Check = Callable[[ServeConfig], Finding]


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, status=Status.OK, found=found)


def warn(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, status=Status.WARN, found=found, advice=advice)


def bad(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, status=Status.FAIL, found=found, advice=advice)


def check_python(_: ServeConfig) -> Finding:
    # An older Python cannot import this module; a newer one may have no wheels of what we need.
    return ok("python", f"{platform.python_version()} at {sys.executable}")


def check_cores(_: ServeConfig) -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _cpu_flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{usable} usable, {', '.join(fast) or platform.machine()}"
    quota = _cgroup_cpus()
    if quota is not None and quota < usable:
        return warn(
            "cores", f"{found}, but the container may use {quota:g}", "raise the container's CPU limit"
        )
    return ok("cores", found)


def check_memory(config: ServeConfig) -> Finding:
    """Workers hold a copy of the weights each, and a KV pool each."""
    free = psutil.virtual_memory().available
    workers = config.prefill.workers + config.decode.workers
    pools = workers * (config.cache.memory_gib or 1.0) * GIB
    found = f"{free / GIB:.1f} GiB free; KV pools of {workers} workers take up to {pools / GIB:.1f} GiB"
    if free < pools:
        return bad("memory", found, "lower cache.memory_gib, or start fewer workers")
    return ok("memory", found)


def check_shared_memory(_: ServeConfig) -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return warn("shared memory", "no /dev/shm", "Ray and NIXL fall back to files, which is slower")
    free = shutil.disk_usage(path).free
    found = f"/dev/shm has {free / GIB:.1f} GiB free"
    if free < _MIN_SHM_BYTES:
        return warn("shared memory", found, "give the container more: docker run --shm-size=2g")
    return ok("shared memory", found)


def check_open_files(_: ServeConfig) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_OPEN_FILES:
        return warn("open files", f"limit {soft}", f"raise it: ulimit -n {min(65536, hard)}")
    return ok("open files", f"limit {soft}")


def check_ports(config: ServeConfig) -> Finding:
    host, port = config.coordinator.host, config.coordinator.port
    if port and not _free(host, port):
        return bad("ports", f"{host}:{port} is taken", "end who listens there, or choose another: --port")
    if config.cluster.dashboard and not _free("127.0.0.1", config.cluster.dashboard_port):
        return warn(
            "ports",
            f"dashboard port {config.cluster.dashboard_port} is taken",
            "another Ray may run here (`ray stop` ends it); Ray will choose the next free port",
        )
    return ok("ports", f"{host}:{port} is free")


def check_ptrace(_: ServeConfig) -> Finding:
    """Whether one worker may write another's memory in one copy; otherwise KV goes over TCP."""
    path = Path("/proc/sys/kernel/yama/ptrace_scope")
    scope = int(path.read_text()) if path.exists() else 0
    if scope == 0 or (scope < 3 and os.geteuid() == 0):
        return ok("process memory", f"workers may copy directly (ptrace_scope {scope})")
    return warn(
        "process memory",
        f"ptrace_scope is {scope}: KV may go over TCP between workers of one machine",
        "allow it: sysctl kernel.yama.ptrace_scope=0, or docker run --cap-add=SYS_PTRACE",
    )


def check_torch(_: ServeConfig) -> Finding:
    import torch  # a second and 200 MB: only this command pays for it

    found = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if not (2, 11) <= _version(torch.__version__) < (2, 14):
        return bad("torch", found, 'install a supported one: pip install "torch>=2.11,<2.14"')
    return ok("torch", found)


def check_gpu(_: ServeConfig) -> Finding:
    import torch  # see check_torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = "; ".join(f"{p.name}, {p.total_memory / GIB:.0f} GiB" for p in names)
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            return bad("gpu", found, 'our kernels need Triton: pip install "pdserve[gpu]"')
        return ok("gpu", f"{found}; triton {triton}")
    if shutil.which("nvidia-smi") is None:
        return ok("gpu", "none; models run on the CPU")
    if torch.version.cuda is None:
        return warn(
            "gpu",
            "there is an NVIDIA driver, but this PyTorch is built without CUDA",
            "make the environment again on this machine (rm -r .venv; make demo)",
        )
    return warn("gpu", "PyTorch finds no usable GPU", "see `nvidia-smi`; is CUDA_VISIBLE_DEVICES empty?")


def check_allocator(_: ServeConfig) -> Finding:
    from pdserve import launch  # reads the environment for everybody

    try:
        launch.refuse_slow_allocator(launch.read_environment())
    except PdServeError as error:
        return bad("cuda allocator", str(error), "unset expandable_segments")
    return ok("cuda allocator", "default")


def installed(check: str, *packages: str) -> Finding | None:
    """A failing finding when none of `packages` is installed."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return None
    return bad(check, "not installed", f'pip install "{packages[0]}"')


def check_cpu_kernels(_: ServeConfig) -> Finding:
    from pdcpu.build import KernelsUnavailable
    from pdcpu.library import load  # may compile for some seconds

    try:
        library = load()
    except KernelsUnavailable as error:
        found = (
            f"{error}: without a GPU, bfloat16 models are computed by torch alone, at half the speed or less"
        )
        return warn("cpu kernels", found, error.advice) if error.advice else ok("cpu kernels", found)
    return ok("cpu kernels", f"compiled for {library.instructions}")


SYSTEM_CHECKS: Final[tuple[Check, ...]] = (
    check_python,
    check_cores,
    check_memory,
    check_shared_memory,
    check_ptrace,
    check_open_files,
    check_ports,
    check_torch,
    check_gpu,
    check_allocator,
    check_cpu_kernels,
)


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    lines = (line for line in info.read_text().splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


def _cgroup_cpus() -> float | None:
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.exists():
        return None
    quota, _, period = path.read_text().partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _digits(text))[:2]


def _digits(text: str) -> Iterator[str]:
    for part in text.split("+")[0].split("."):
        if part.isdigit():
            yield part
