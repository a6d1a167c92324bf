"""What the figures were measured on: machine, version, commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pdserve import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Of the machine the load came from."""

    started: str
    pdserve: str
    commit: str
    """Empty where pdserve is not run from a checkout; ends in + when files were changed."""
    python: str
    platform: str
    cpu: str
    cores: int
    memory_gib: float
    load_before: float
    """One-minute load average when the run began: near 0 on a quiet machine."""


def describe_environment() -> Environment:
    return Environment(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        pdserve=__version__,
        commit=_commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        load_before=round(os.getloadavg()[0], 2),
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _commit() -> str:
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + "+" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
