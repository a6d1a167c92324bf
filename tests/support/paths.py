"""Where tests find optional data that a user's checkout does not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("PDSERVE_SHARED", REPO.parent / "shared"))


def shared(relative: str) -> Path:
    """A path under the optional data folder; skips the test when it is not there."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"optional test data {relative} is not here")
    return path
