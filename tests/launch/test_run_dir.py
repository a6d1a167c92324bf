"""A deployment's directory ends with it, or with the next one when it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pdserve.cluster.run_dir import RunDir
from tests.support.paths import REPO

HOLD = """
import sys
from pathlib import Path
from pdserve.cluster.run_dir import RunDir
held = RunDir.make(Path(sys.argv[1]))
print(held.path, flush=True)
sys.stdin.read()
"""


def hold(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """Another process with a directory of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_directory_is_private_and_goes_with_what_is_in_it(tmp_path: Path) -> None:
    run_dir = RunDir.make(tmp_path)
    assert run_dir.path.stat().st_mode & 0o777 == 0o700
    (run_dir.path / "a.sock").touch()
    run_dir.remove()
    run_dir.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    killed, left = hold(tmp_path)
    living, used = hold(tmp_path)
    try:
        end(killed)
        assert left.exists()
        RunDir.make(tmp_path).remove()
        assert not left.exists()
        assert used.exists()
    finally:
        end(living)


def test_what_is_not_a_run_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pdserve-notes").mkdir()
    (tmp_path / "pdserve-file").touch()
    RunDir.make(tmp_path).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pdserve-file", "pdserve-notes"]
