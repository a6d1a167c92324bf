"""From the C++ in `src/` to a shared library in the user's cache, for the instruction set of this CPU.

The library's name holds a hash of the sources, the flags and the compiler, so a new version never meets an
old build, and machines that share a home directory do not take each other's. It is renamed when whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).with_name("src")
CACHE: Final = Path("~/.cache/pdserve/pdcpu")
COMPILE_TIMEOUT_S: Final = 300.0
COMPILERS: Final = ("c++", "g++", "clang++")
_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno")
_AVX2: Final = ("-mavx2", "-mfma")
_AVX512: Final = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")

INSTRUCTION_SETS: Final[dict[str, tuple[frozenset[str], tuple[str, ...]]]] = {
    "avx512_bf16": (
        frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}),
        (*_AVX512, "-mavx512bf16"),
    ),
    "avx512": (frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"}), _AVX512),
    "avx2": (frozenset({"avx2", "fma"}), _AVX2),
}
"""Best first: the CPU flags (as /proc/cpuinfo spells them) that each wants, and the compiler's options."""


class KernelsUnavailable(Exception):
    """There is no library on this machine, and why; `advice` says what would change that ("" if nothing)."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Recipe:
    """What will be compiled, by what, to where."""

    instructions: str
    command: tuple[str, ...]
    path: Path

    @property
    def built(self) -> bool:
        return self.path.exists()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """As the kernel names them; empty where it does not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def best_instructions(flags: frozenset[str]) -> str | None:
    """The first instruction set whose flags are all there."""
    return next((name for name, (wanted, _) in INSTRUCTION_SETS.items() if wanted <= flags), None)


def find_compiler() -> tuple[str, ...] | None:
    """The system's, or else the one that the PyPI package `ziglang` brings."""
    for name in COMPILERS:
        if (found := shutil.which(name)) is not None:
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def recipe(instructions: str | None = None, cache: Path | None = None) -> Recipe:
    """How to build for this CPU, or for the instruction set given. Raises `KernelsUnavailable`."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not sys.platform.startswith("linux"):
        raise KernelsUnavailable(f"no kernels for {platform.machine()} on {sys.platform}")
    chosen = instructions or best_instructions(cpu_flags())
    if chosen is None:
        raise KernelsUnavailable("the CPU has no AVX2 with FMA")
    options = (*_FLAGS, *INSTRUCTION_SETS[chosen][1])
    digest = hashlib.sha256("\0".join(options).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder, stem = (cache or CACHE).expanduser(), f"pdcpu-{chosen}-{digest.hexdigest()[:16]}"
    compiler = find_compiler()
    if compiler is not None:
        by = hashlib.sha256("\0".join((*compiler, *_identity(compiler))).encode()).hexdigest()[:8]
        return Recipe(chosen, (*compiler, *options), folder / f"{stem}-{by}.so")
    # Built while there was a compiler: in an earlier stage of a container image, perhaps.
    for built in sorted(folder.glob(f"{stem}-*.so")):
        return Recipe(chosen, (), built)
    raise KernelsUnavailable(
        "no C++ compiler", "install g++ or clang++, or `pip install ziglang` (extra `cpu` of pdserve)"
    )


def build(wanted: Recipe) -> Path:
    """The library's path, compiled now if it is not there yet. Safe for several processes at once.

    Raises `KernelsUnavailable` with the compiler's words.
    """
    if wanted.built:
        return wanted.path
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(wanted.path.with_suffix(".lock")):
            if not wanted.built:
                _compile(wanted)
    except OSError as error:
        raise KernelsUnavailable(f"cannot write {wanted.path.parent}: {error}", "make it writable") from error
    return wanted.path


def _compile(wanted: Recipe) -> None:
    with tempfile.TemporaryDirectory(dir=wanted.path.parent) as folder:
        made = Path(folder) / "pdcpu.so"
        command = [*wanted.command, str(SOURCES / "pdcpu.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelsUnavailable(f"{wanted.command[0]}: {error}", "try another C++ compiler") from error
        if done.returncode:
            raise KernelsUnavailable(
                f"{wanted.command[0]} failed: {_first_error(done.stderr)}",
                "update the compiler (gcc 10, clang 12 or later), or `pip install ziglang`",
            )
        os.replace(made, wanted.path)


def _first_error(output: str) -> str:
    lines = output.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a word")


def _identity(compiler: Sequence[str]) -> tuple[str, ...]:
    """Size and time of the compiler's file: its version, without starting it."""
    with contextlib.suppress(OSError):
        status = Path(compiler[0]).stat()
        return (str(status.st_size), str(status.st_mtime_ns))
    return ()


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Others wait: two compilers side by side would both take twice as long."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
