"""Everything a system under test runs: started, weighed, frozen while others are measured, and ended.

A server may start helpers that leave its process group (Ray does), or whose parent dies first. The benchmark
makes itself the reaper of orphans, remembers every process it ever saw below a root, and ends them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

PR_SET_CHILD_SUBREAPER: Final = 36


class ServerDied(Exception):
    """A server ended by itself; the message holds the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How one process of a system is started; printed in the report. `env` holds only what is added."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path


class ProcessSet:
    """The processes of one system. Not thread-safe, but for `members` which the memory sampler also calls."""

    def __init__(self) -> None:
        self._roots: list[tuple[subprocess.Popen[bytes], Command]] = []
        self._seen: dict[int, psutil.Process] = {}
        self._lock = threading.Lock()

    def spawn(self, command: Command, *, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a root in a session of its own. Standard output goes to the log, unless `stdin` is a pipe."""
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            root = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.env},
                stdin=stdin,
                stdout=subprocess.PIPE if stdin == subprocess.PIPE else log,
                stderr=log,
                start_new_session=True,
            )
        self._roots.append((root, command))
        self.members()
        return root

    def members(self) -> list[psutil.Process]:
        """Every living process of the system: below a root, in a root's session, or once seen there."""
        with self._lock:
            sessions = {root.pid for root, _ in self._roots}
            found = dict(self._seen)
            for process in psutil.process_iter():
                with contextlib.suppress(ProcessLookupError):
                    if os.getsid(process.pid) in sessions:
                        found[process.pid] = process
            for process in list(found.values()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.update((child.pid, child) for child in process.children(recursive=True))
            self._seen = {pid: process for pid, process in found.items() if _alive(process)}
            return list(self._seen.values())

    def raise_if_dead(self) -> None:
        for root, command in self._roots:
            if root.poll() is not None:
                raise ServerDied(f"{command.argv[0]} exited with {root.returncode}:\n{tail(command.log)}")

    def pss_bytes(self) -> int:
        """Memory of all members now, shared pages counted once (PSS); RSS where the kernel denies PSS."""
        return sum(_pss_bytes(process) for process in self.members())

    def cpu_s(self) -> float:
        total = 0.0
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def freeze(self) -> None:
        """Stop every member where it stands (SIGSTOP): it uses no CPU until `thaw`."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def stop(self, *, grace_s: float) -> None:
        """Ask the roots to end, wait at most `grace_s`, then kill whatever of the system still lives."""
        members = self.members()
        self.thaw()
        for root, _ in self._roots:
            if root.poll() is None:
                root.send_signal(signal.SIGTERM)
        psutil.wait_procs(members, timeout=grace_s)
        leftovers = self.members()
        for process in leftovers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(leftovers, timeout=10.0)
        for root, _ in self._roots:
            root.wait(timeout=10.0)
            for pipe in (root.stdin, root.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._roots.clear()
        self._seen.clear()

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


class MemorySampler:
    """Keeps the highest summed PSS of a `ProcessSet`, looked at twice a second on a thread of its own."""

    def __init__(self, processes: ProcessSet, *, interval_s: float = 0.5) -> None:
        self._processes, self._interval_s = processes, interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self.peak_bytes = 0

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.peak_bytes = max(self.peak_bytes, self._processes.pss_bytes())
            self._stopped.wait(self._interval_s)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


@contextlib.contextmanager
def reaping_orphans() -> Iterator[None]:
    """Inherit every orphan below this process (Linux) and kill what is left of them in the end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = {child.pid for child in psutil.Process().children()}
    try:
        yield
    finally:
        for child in psutil.Process().children(recursive=True):
            if child.pid not in before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


def tail(path: Path, *, num_lines: int = 12) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
    except OSError as error:
        return f"(no log: {error})"


def python_of(venv: Path) -> str:
    return str(venv / "bin" / "python")


def allowed_cores() -> Sequence[int]:
    """Cores this process may run on, in order."""
    return sorted(os.sched_getaffinity(0))


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _pss_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except ProcessLookupError:
        return 0
    except OSError:
        with contextlib.suppress(psutil.NoSuchProcess):
            return int(process.memory_info().rss)
    return 0
