"""A checkpoint's copy on a machine's own disk, made once for all workers there and mapped by each of them.

    DIR/NAME-KEY/                 a whole copy; KEY changes with any file of the checkpoint
    DIR/.NAME-KEY.partial/        being made, or left by a process that was killed
    DIR/.NAME-KEY.lock            held by who makes it

Weights on a shared filesystem are read from it once per machine, not once per worker and start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pdserve.core.errors import CheckpointError

Say = Callable[[str], None]
_CHUNK_BYTES: Final = 64 * 2**20


def local_copy(source: Path, folder: Path, say: Say) -> Path:
    """Where the copy of the checkpoint directory `source` below `folder` is, once it is whole.

    say: called with words, while this or another process copies.
    Raises `CheckpointError` where there is no room, or one of the two cannot be used.
    """
    try:
        files = sorted(path for path in source.rglob("*") if path.is_file())
        target = folder / f"{source.name}-{_key(source, files)}"
        if not target.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with _held(folder / f".{target.name}.lock", say):
                if not target.is_dir():  # another may have made it meanwhile
                    _copy(source, files, target, say)
    except OSError as error:
        raise CheckpointError(
            f"model.local_dir: {source} cannot be copied to {folder}: {error.strerror or error}"
        ) from error
    return target


def _key(source: Path, files: list[Path]) -> str:
    """Of names, sizes and times of change: reading all of it would take what the copy is to save."""
    hasher = hashlib.sha256(str(source.resolve()).encode())
    for path in files:
        found = path.stat()
        hasher.update(f"\0{path.relative_to(source)}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return hasher.hexdigest()[:16]


@contextmanager
def _held(lock: Path, say: Say) -> Iterator[None]:
    # The kernel drops the lock with the process, so a killed one leaves nothing to clean up.
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another worker of this machine that copies the checkpoint")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(source: Path, files: list[Path], target: Path, say: Say) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    size_bytes = sum(path.stat().st_size for path in files)
    free_bytes = shutil.disk_usage(target.parent).free
    if size_bytes > free_bytes:
        raise CheckpointError(
            f"model.local_dir: {source.name} has {size_bytes / 1e9:.1f} GB, {target.parent} has "
            f"{free_bytes / 1e9:.1f} GB free"
        )
    copied = 0
    try:
        for path in files:
            place = partial / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as reader, place.open("wb") as writer:
                while sent := _some(reader.fileno(), writer.fileno()):
                    copied += sent
                    say(f"copying the checkpoint: {copied / 1e9:.1f} of {size_bytes / 1e9:.1f} GB")
                writer.flush()
                os.fsync(writer.fileno())
        # Seen under its name only when all of it is on the disk.
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _some(reader: int, writer: int) -> int:
    """Inside the kernel; returns bytes, 0 at the end."""
    return os.sendfile(writer, reader, None, _CHUNK_BYTES)
