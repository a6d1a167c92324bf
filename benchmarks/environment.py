"""What a figure was measured on: machine, commit, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import psutil

REPO: Final = Path(__file__).resolve().parent.parent
NOTABLE_CPU_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    memory_gib: float
    kernel: str
    python: str
    commit: str
    uncommitted_changes: bool
    load_before: float
    """One-minute load average when the run began: near 0 on a quiet machine."""
    started: str


def describe_environment() -> Environment:
    model, flags = _cpu()
    return Environment(
        cpu=model,
        cpu_flags=tuple(flag for flag in NOTABLE_CPU_FLAGS if flag in flags),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        commit=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        uncommitted_changes=bool(_git("status", "--porcelain", "--untracked-files=no")),
        load_before=round(os.getloadavg()[0], 2),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def installed_versions(venv: Path, packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of `packages` that the virtual environment at `venv` holds."""
    folders = [str(path) for path in venv.glob("lib/python3*/site-packages")]
    found = {dist.metadata["Name"]: dist.version for dist in distributions(path=folders)}
    return {package: found[package] for package in packages if package in found}


def _cpu() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine(), set()
    return fields.get("model name", platform.machine()), set(
        fields.get("flags", fields.get("Features", "")).split()
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
