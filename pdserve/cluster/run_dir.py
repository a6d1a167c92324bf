"""A deployment's own directory: sockets, and everything a local Ray writes. Gone when the deployment ends.

A process that is killed cannot clean up; the next one does. Whose directory is in use is told by a lock on a
file in it, which the kernel drops with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, Self

ROOT: Final = Path("/tmp")
"""Unix socket paths end at 107 bytes, and Ray adds 60 to this one: TMPDIR may be too deep."""
_PREFIX: Final = "pdserve-"
_LOCK: Final = "lock"


class RunDir:
    """`path`, mode 700, ours until `remove` or the end of this process."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path: Final = path
        self._lock_fd = lock_fd

    @classmethod
    def of_keeper(cls, path: Path) -> Self:
        """One that another process holds and will remove."""
        return cls(path, lock_fd=-1)

    @classmethod
    def make(cls, root: Path = ROOT) -> Self:
        """A new one; what killed deployments of this user left under `root` is removed first."""
        for left in root.glob(f"{_PREFIX}*"):
            _remove_if_abandoned(left)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock_fd = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        return cls(path, lock_fd)

    def remove(self) -> None:
        """Delete it with what is in it. Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def existing(root: Path = ROOT) -> list[Path]:
    """This user's directories under `root`, whoever uses them."""
    found = []
    for path in root.glob(f"{_PREFIX}*"):
        # One may end while we look.
        with contextlib.suppress(OSError):
            if not path.is_symlink() and path.stat().st_uid == os.getuid():
                found.append(path)
    return sorted(found)


def _remove_if_abandoned(path: Path) -> None:
    # Another deployment may be cleaning up, or making it, at the same time: then it is not ours to touch.
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            return
        lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock_fd)
