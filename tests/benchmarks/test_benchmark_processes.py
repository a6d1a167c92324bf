"""The benchmark ends, freezes and weighs everything that a system started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import Command, ProcessSet, ServerDied

# A root whose child leaves its session and outlives it, as Ray's daemons do; both ignore SIGTERM.
ORPHAN_MAKER = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
stay = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
child = subprocess.Popen([sys.executable, "-c", stay], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
signal.pause()
"""


def command(code: str, log: Path) -> Command:
    return Command(argv=(sys.executable, "-c", code), env={}, log=log)


def read_line(root: subprocess.Popen[bytes]) -> str:
    assert root.stdout is not None
    return root.stdout.readline().decode().strip()


def test_stop_ends_a_child_that_left_the_session_and_ignores_sigterm(tmp_path: Path) -> None:
    processes = ProcessSet()
    root = processes.spawn(command(ORPHAN_MAKER, tmp_path / "log"), stdin=subprocess.PIPE)
    child = int(read_line(root))
    assert {root.pid, child} <= {process.pid for process in processes.members()}
    processes.stop(grace_s=0.2)
    assert not psutil.pid_exists(root.pid)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_frozen_system_is_stopped_until_it_is_thawed(tmp_path: Path) -> None:
    processes = ProcessSet()
    echo = "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)"
    root = processes.spawn(command(echo, tmp_path / "log"), stdin=subprocess.PIPE)
    try:
        processes.freeze()
        os.waitid(os.P_PID, root.pid, os.WSTOPPED)  # returns once it stands still
        assert psutil.Process(root.pid).status() == psutil.STATUS_STOPPED
        processes.thaw()
        assert root.stdin is not None
        root.stdin.write(b"awake\n")
        root.stdin.flush()
        assert read_line(root) == "awake"
    finally:
        processes.stop(grace_s=5.0)


def test_memory_counts_what_children_hold(tmp_path: Path) -> None:
    processes = ProcessSet()
    code = "import signal; held = bytearray(64 * 2**20); print('up', flush=True); signal.pause()"
    root = processes.spawn(command(code, tmp_path / "log"), stdin=subprocess.PIPE)
    try:
        assert read_line(root) == "up"
        assert processes.pss_bytes() >= 64 * 2**20
    finally:
        processes.stop(grace_s=5.0)
    assert processes.pss_bytes() == 0


def test_a_server_that_ends_by_itself_is_reported_with_its_log(tmp_path: Path) -> None:
    processes = ProcessSet()
    root = processes.spawn(command("import sys; sys.exit('no such model')", tmp_path / "log"))
    root.wait(timeout=30)
    with pytest.raises(ServerDied, match="no such model"):
        processes.raise_if_dead()
    processes.stop(grace_s=0.0)
