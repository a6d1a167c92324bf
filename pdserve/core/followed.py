"""Files that somebody else renews."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class FollowedFiles:
    """Says when one of them is another than before. One `stat` each per question; nothing is read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = tuple(files)
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Since the last question, or since this was made. A file that has gone has changed."""
        stamps, before = self._stamps(), self._seen
        self._seen = stamps
        return stamps != before

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
