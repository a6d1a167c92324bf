"""What the ranks of a worker are called, and where they meet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """A process's place among the ranks of its worker."""

    rank: int
    size: int
    meeting: Path
    """A directory on the machine of all of them, private to their user; made by the first that comes."""

    @property
    def socket(self) -> Path:
        """Where rank 0 listens for the others."""
        return self.meeting / "leader.sock"

    @property
    def store(self) -> Path:
        """The file in which they find one another."""
        return self.meeting / "store"


def rank_id(worker: WorkerId, rank: int, size: int) -> WorkerId:
    """A rank as a transfer peer; the only rank of a worker is called as the worker is."""
    return worker if size == 1 else WorkerId(f"{worker}/{rank}")


def worker_of(rank: WorkerId) -> WorkerId:
    """Whose rank it is."""
    return WorkerId(rank.partition("/")[0])


def make_meeting(spec: RankSpec) -> None:
    """Make the directory, or find it. Raises `ConfigError` when it is somebody else's."""
    spec.meeting.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = spec.meeting.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{spec.meeting} is not private to this user; remove it")
