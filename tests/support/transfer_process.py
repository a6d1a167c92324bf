"""A transfer service in a process of its own, which a test can kill or stop.

The child takes one JSON command per line and answers with events, pickled and in base64, one per line. They
leave through a copy of its standard output, which itself is joined to standard error: UCX logs there.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvtransfer.factory import make_backend
from kvtransfer.protocol import Push, TransferEvent
from kvtransfer.service import TransferService
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import CacheGroup, GroupLayout
from pdserve.core.transfer_settings import TransferBackendName
from tests.support.paths import REPO
from tests.support.transfer import WAIT_S, Events, Pools, fingerprint

BIG = GroupLayout(
    group=CacheGroup(name="big", num_layers=8, num_kv_heads=4, head_dim=64, dtype="bfloat16"), block_tokens=64
)
NUM_BLOCKS = 32


def _state_in(proc: Path) -> str:
    return (proc / "stat").read_text().rpartition(")")[2].split()[0]


class NodeProcess:
    """Starts the child and keeps what it says. Pool files are under `directory`."""

    def __init__(
        self, name: str, directory: Path, *, epoch: int = 1, seed: int | None, ucx: dict[str, str]
    ) -> None:
        directory.mkdir(parents=True)
        self.name, self.epoch, self.directory = WorkerId(name), epoch, directory
        self.events = Events()
        self._ids = itertools.count(1)
        self._ready = threading.Event()
        self.metadata = b""
        options = {"name": name, "epoch": epoch, "seed": seed, "ucx": ucx, "directory": str(directory)}
        self._errors = (directory / "stderr").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.transfer_process", json.dumps(options)],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = pickle.loads(base64.b64decode(line))
            if isinstance(found, bytes):
                self.metadata = found
                self._ready.set()
            else:
                self.events(found)

    @property
    def pid(self) -> int:
        return self.process.pid

    def pools(self) -> Pools:
        return Pools.look((BIG,), NUM_BLOCKS, self.directory)

    def await_ready(self) -> None:
        assert self._ready.wait(WAIT_S), (self.directory / "stderr").read_text()

    def meet(self, other: NodeProcess) -> None:
        self._send(do="connect", peer=other.name, epoch=other.epoch, metadata=other.metadata.hex())
        self.events.await_connected(other.name, other.epoch)

    def disconnect(self, other: NodeProcess) -> None:
        self._send(do="disconnect", peer=other.name)

    def push(
        self,
        peer: str,
        src: Sequence[int],
        dst: Sequence[int],
        *,
        deadline_s: float = WAIT_S,
        note: bytes = b"note",
        padding: int = 0,
    ) -> int:
        """The note is followed by `padding` zeros."""
        push_id = next(self._ids)
        blocks = {"src": list(src), "dst": list(dst)}
        what = {"deadline_s": deadline_s, "note": note.hex(), "padding": padding}
        self._send(do="push", id=push_id, peer=peer, **blocks, **what)
        return push_id

    def _send(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and proof of it."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.process.wait(WAIT_S) == -signal.SIGKILL

    def freeze(self) -> None:
        """SIGSTOP, and proof of it: every thread stands still, one in a system call finishes that first."""
        os.kill(self.pid, signal.SIGSTOP)
        until = time.monotonic() + WAIT_S
        while any(state != "T" for state in self._thread_states()):
            assert time.monotonic() < until, "it does not stop"

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def state(self) -> str:
        """As /proc shows it: R running, S sleeping, T stopped, Z dead."""
        return _state_in(Path(f"/proc/{self.pid}"))

    def _thread_states(self) -> list[str]:
        return [_state_in(thread) for thread in Path(f"/proc/{self.pid}/task").iterdir()]

    def stop(self) -> int:
        """Ask it to end; its exit status, 0 when it ended well."""
        with contextlib.suppress(BrokenPipeError):
            self._send(do="stop")
        return self.process.wait(WAIT_S)

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(WAIT_S)
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _take_stdout() -> Callable[[TransferEvent | bytes], None]:
    """A way to the parent that no library writes to."""
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(item: TransferEvent | bytes) -> None:
        parent.write(base64.b64encode(pickle.dumps(item)).decode() + "\n")
        parent.flush()

    return say


def main() -> None:
    say = _take_stdout()
    options = json.loads(sys.argv[1])
    layouts = (BIG,)
    ours = fingerprint(layouts=layouts)
    pools = Pools(layouts, NUM_BLOCKS, seed=options["seed"], directory=Path(options["directory"]))
    backend = make_backend(
        TransferBackendName.NIXL,
        WorkerId(options["name"]),
        options["epoch"],
        pools.regions,
        ours,
        ucx=options["ucx"],
    )
    service = TransferService(backend, say)
    service.start()
    say(backend.metadata)
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "connect":
                metadata = bytes.fromhex(command["metadata"])
                service.connect(WorkerId(command["peer"]), command["epoch"], ours, metadata)
            case "disconnect":
                service.disconnect(WorkerId(command["peer"]))
            case "push":
                service.submit(_push(command))
            case "stop":
                break
    service.stop()
    if not service.join(WAIT_S):
        sys.exit("the transfer thread did not end")


def _push(command: dict[str, Any]) -> Push:
    return Push(
        id=command["id"],
        peer=WorkerId(command["peer"]),
        group=0,
        src_blocks=tuple(BlockId(b) for b in command["src"]),
        dst_blocks=tuple(BlockId(b) for b in command["dst"]),
        layers=(0, BIG.group.num_layers),
        note=bytes.fromhex(command["note"]) + bytes(command["padding"]),
        deadline=time.monotonic() + command["deadline_s"],
    )


if __name__ == "__main__":
    main()
