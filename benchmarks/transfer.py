"""How fast KV blocks move between two processes of one host, beside memcpy in the same run.

    python -m benchmarks.transfer --output build/transfer.json

Per transport and block size, interleaved: a push of `--push-mib` in scattered blocks and a memcpy of the same
blocks (GB/s, 1e9 bytes), the time of a one-block push at the sender, and the time from `submit` until its
note is an event at the receiver, which was idle. Then the CPU time of an idle, connected service.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from benchmarks.environment import describe_environment
from kvtransfer.factory import make_backend
from kvtransfer.protocol import (
    NoteArrived,
    Outcome,
    PathInfo,
    PeerConnected,
    PeerFailed,
    PoolRegion,
    Push,
    PushEnded,
    TransferEvent,
)
from kvtransfer.service import TransferService
from pdserve.core.config import TransferBackendName
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout

BLOCK_BYTES: Final = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
TRANSPORTS: Final[dict[str, dict[str, str]]] = {"default": {}, "tcp": {"TLS": "tcp", "NET_DEVICES": "lo"}}
IDLE_S: Final = 3.0
WAIT_S: Final = 60.0
_STAMP: Final = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class BestAndMedian:
    """Of all rounds. On a busy machine the median is mostly the scheduler's."""

    best: float
    median: float

    def __str__(self) -> str:
        return f"{self.best:.3g} / {self.median:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    transport: str
    path: str
    block_kib: int
    push_gb_per_s: BestAndMedian
    """From the start of the transfer to its completion at the sender, note included."""
    memcpy_gb_per_s: BestAndMedian
    one_block_us: BestAndMedian
    """One block, at the idle sender: from the start of the transfer to its completion."""
    note_us: BestAndMedian
    """One block: from `submit` in the idle sender to the note's event in the idle receiver."""


def layouts() -> tuple[GroupLayout, ...]:
    """A cache group per block size, one layer each."""
    return tuple(
        GroupLayout(
            group=CacheGroup(
                name=f"b{size}", num_layers=1, num_kv_heads=1, head_dim=size // 64, dtype="bfloat16"
            ),
            block_tokens=16,
        )
        for size in BLOCK_BYTES
    )


class Side:
    """A worker's pools and running service; `wait` returns events as they come."""

    def __init__(self, name: str, pool_bytes: int, ucx: dict[str, str]) -> None:
        self.name = WorkerId(name)
        self.arrays = [np.ones(pool_bytes, dtype=np.uint8) for _ in BLOCK_BYTES]
        self.fingerprint = Fingerprint(protocol=PROTOCOL_VERSION, model="benchmark", layouts=layouts())
        regions = [
            PoolRegion(
                address=array.ctypes.data,
                size_bytes=pool_bytes,
                layout=layout,
                num_blocks=pool_bytes // layout.block_bytes,
            )
            for array, layout in zip(self.arrays, layouts(), strict=True)
        ]
        self.backend = make_backend(
            TransferBackendName.NIXL, self.name, 1, regions, self.fingerprint, ucx=ucx
        )
        self._events: list[TransferEvent] = []
        self._changed = threading.Condition()
        self.note_seconds: list[float] = []
        self.service = TransferService(self.backend, self._on_event)
        self.service.start()

    def _on_event(self, event: TransferEvent) -> None:
        if isinstance(event, NoteArrived):
            self.note_seconds.append(time.monotonic() - _STAMP.unpack(event.note)[0])
            return
        with self._changed:
            self._events.append(event)
            self._changed.notify()

    def wait(self) -> TransferEvent:
        with self._changed:
            if not self._changed.wait_for(lambda: self._events, WAIT_S):
                raise TimeoutError("no transfer event")
            return self._events.pop(0)

    def push(self, push_id: int, group: int, src: Sequence[int], dst: Sequence[int]) -> PushEnded:
        self.service.submit(
            Push(
                id=push_id,
                peer=WorkerId("receiver"),
                group=group,
                src_blocks=tuple(BlockId(b) for b in src),
                dst_blocks=tuple(BlockId(b) for b in dst),
                layers=(0, 1),
                note=_STAMP.pack(time.monotonic()),
                deadline=time.monotonic() + WAIT_S,
            )
        )
        end = self.wait()
        if not isinstance(end, PushEnded) or end.outcome is not Outcome.COMPLETED:
            raise RuntimeError(f"the push failed: {end}")
        return end


def receive(pipe: Connection, pool_bytes: int, ucx: dict[str, str]) -> None:
    """The other process: stands still, and hands over its note times when asked."""
    side = Side("receiver", pool_bytes, ucx)
    pipe.send(side.backend.metadata)
    while pipe.recv() == "notes":
        pipe.send(side.note_seconds)
        side.note_seconds = []
    side.service.stop()
    side.service.join(WAIT_S)


def measure(
    transport: str, ucx: dict[str, str], args: argparse.Namespace
) -> tuple[list[Row], float, PathInfo]:
    """Rows, the idle receiver's share of a core, and what the connection's own probe found."""
    pool_bytes, push_bytes = args.pool_mib << 20, args.push_mib << 20
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=receive, args=(theirs, pool_bytes, ucx))
    process.start()
    sender = Side("sender", pool_bytes, ucx)
    sender.service.connect(WorkerId("receiver"), 1, sender.fingerprint, pipe.recv())
    met = sender.wait()
    if not isinstance(met, PeerConnected):
        assert isinstance(met, PeerFailed)
        raise RuntimeError(met.error)
    rows = []
    for group, size in enumerate(BLOCK_BYTES):
        rows.append(
            _measure_size(transport, met.path.path, sender, pipe, group, size, push_bytes, args.rounds)
        )
    idle = _idle_share(process.pid)
    pipe.send("stop")
    sender.service.stop()
    sender.service.join(WAIT_S)
    process.join(WAIT_S)
    return rows, idle, met.path


def _measure_size(
    transport: str,
    path: str,
    sender: Side,
    pipe: Connection,
    group: int,
    size: int,
    push_bytes: int,
    rounds: int,
) -> Row:
    rng = np.random.default_rng(group)
    array = sender.arrays[group]
    num_blocks, count = len(array) // size, max(1, push_bytes // size)
    target = np.ones_like(array)
    pushed, copied, single = [], [], []
    for i in range(rounds + 1):
        src, dst = (rng.permutation(num_blocks)[:count].tolist() for _ in range(2))
        pushed.append(sender.push(2 * i, group, src, dst).seconds)
        began = time.perf_counter()
        for a, b in zip(src, dst, strict=True):
            target[b * size : (b + 1) * size] = array[a * size : (a + 1) * size]
        copied.append(time.perf_counter() - began)
    pipe.send("notes")
    pipe.recv()
    for i in range(4 * rounds):
        time.sleep(0.01)  # the receiver is idle when the note comes
        single.append(sender.push(2 * i + 1, group, src[:1], dst[:1]).seconds)
    time.sleep(0.1)
    pipe.send("notes")
    notes: list[float] = pipe.recv()
    moved = count * size
    return Row(
        transport=transport,
        path=path,
        block_kib=size >> 10,
        push_gb_per_s=_rate(moved, pushed[1:]),
        memcpy_gb_per_s=_rate(moved, copied[1:]),
        one_block_us=_microseconds(single),
        note_us=_microseconds(notes),
    )


def _rate(size_bytes: int, seconds: Sequence[float]) -> BestAndMedian:
    return BestAndMedian(size_bytes / min(seconds) / 1e9, size_bytes / statistics.median(seconds) / 1e9)


def _microseconds(seconds: Sequence[float]) -> BestAndMedian:
    return BestAndMedian(min(seconds) * 1e6, statistics.median(seconds) * 1e6)


def _idle_share(pid: int | None) -> float:
    process = psutil.Process(pid)
    before = process.cpu_times()
    time.sleep(IDLE_S)
    after = process.cpu_times()
    return round((after.user + after.system - before.user - before.system) / IDLE_S, 4)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| transport | path | block KiB | push GB/s | memcpy GB/s | one block us | block + note us |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.transport} | {r.path} | {r.block_kib} | {r.push_gb_per_s} | {r.memcpy_gb_per_s} "
        f"| {r.one_block_us} | {r.note_us} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--push-mib", type=int, default=32, help="bytes of one push")
    parser.add_argument("--pool-mib", type=int, default=64, help="bytes of one pool")
    args = parser.parse_args()
    environment = describe_environment()
    rows: list[Row] = []
    idle: dict[str, float] = {}
    probes: dict[str, PathInfo] = {}
    for transport, ucx in TRANSPORTS.items():
        found, idle[transport], probes[transport] = measure(transport, ucx, args)
        rows += found
    print(json.dumps(dataclasses.asdict(environment)))
    print(f"rounds {args.rounds}, push {args.push_mib} MiB, pool {args.pool_mib} MiB; best / median\n")
    print(table(rows))
    for transport, share in idle.items():
        print(f"{transport}: idle receiver {share:.2%} of a core; probe at connect {probes[transport]}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": dataclasses.asdict(environment),
            "config": {"rounds": args.rounds, "push_mib": args.push_mib, "pool_mib": args.pool_mib},
            "rows": [dataclasses.asdict(row) for row in rows],
            "idle_share_of_a_core": idle,
            "probes": {name: dataclasses.asdict(probe) for name, probe in probes.items()},
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
