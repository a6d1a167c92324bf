"""Writing model directories: all or nothing, with progress."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and a few words on what is being done."""


@contextmanager
def staged_dir(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that takes its name when the block succeeds and vanishes if it fails.

    The parent must exist and `target` must not, so a directory that is there is always complete.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp is private; a model is not
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
