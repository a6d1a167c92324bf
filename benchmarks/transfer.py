"""How fast KV blocks move between two processes, beside what others reach in the same run.

    python -m benchmarks.transfer --output build/transfer.json

Transports: what UCX picks on this host, TCP over loopback, and, for root, TCP between two network namespaces.
Per transport and block size, interleaved in every round:

    push      `--push-mib` in scattered blocks of a pool that fits no cache
    kernel    as many blocks by `process_vm_writev`, with which UCX copies between processes of a host
    memcpy    as many blocks, within this process
    one       as many bytes from one block into one block, over and over, as ucx_perftest sends them
    perftest  UCX's own test of the same transport, messages of that size from one buffer into one, with its
              own version of UCX (Debian: ucx-utils): compare it with `one`
    iperf3    one TCP stream for a second, between the namespaces
    digest    what a digest of the same blocks would take, as a share of the push's time

then the time of a one-block push at the sender and until its note is an event at an idle receiver; and what
100 short requests wait behind a huge one, with and without taking turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as File
from typing import Final

import numpy as np
import psutil
import xxhash

from benchmarks.environment import describe_environment
from benchmarks.network_namespaces import DEVICE, available, two_namespaces
from benchmarks.transfer_pair import BLOCK_BYTES, Pair, Transport, connected
from benchmarks.transfer_tools import iperf3, ucx_perftest, write_into
from kvtransfer.protocol import Outcome, Path, PathInfo, PushEnded

IDLE_S: Final = 3.0
SHORT_REQUESTS: Final = 100
SHORT_BLOCKS: Final = 4
HUGE_PUSHES: Final = 16
TWO_NAMESPACES: Final = "tcp, two namespaces"


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
    kernel_gb_per_s: BestAndMedian | None
    """None where the bytes do not go that way."""
    memcpy_gb_per_s: BestAndMedian
    one_gb_per_s: BestAndMedian
    perftest_gb_per_s: BestAndMedian | None
    iperf3_gb_per_s: BestAndMedian | None
    digest_share: BestAndMedian
    """Time of a digest / time of the push, each at its best and at its median."""
    one_block_us: BestAndMedian
    """One block, at the idle sender: from the start of the transfer to its completion."""
    note_us: BestAndMedian
    """One block: from `submit` in the idle sender to the note's event in the idle receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Short requests that come just after a huge one: milliseconds from the first submit to the ends."""

    transport: str
    order: str
    huge_mib: int
    short_p50_ms: float
    short_last_ms: float
    huge_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    rows: list[Row]
    turns: list[Turns]
    idle_share: float
    """Of a core, by the idle, connected receiver."""
    probe: PathInfo


def measure(transport: Transport, args: argparse.Namespace) -> Measured:
    pool_bytes, push_bytes = args.pool_mib << 20, args.push_mib << 20
    with connected(transport, pool_bytes) as pair:
        rows = [
            _measure_size(transport, pair, group, size, push_bytes, args)
            for group, size in enumerate(BLOCK_BYTES)
        ]
        turns = [
            _turns(transport.name, pair, order, round_of)
            for round_of in range(3)
            for order in ("first come, first served", "in turns")
        ]
        idle = _idle_share(pair.receiver_pid)
        return Measured(rows=rows, turns=turns, idle_share=idle, probe=pair.path)


def _measure_size(
    transport: Transport, pair: Pair, group: int, size: int, push_bytes: int, args: argparse.Namespace
) -> Row:
    rng, sender, rounds = np.random.default_rng(group), pair.sender, args.rounds
    array = sender.arrays[group]
    num_blocks, count = len(array) // size, max(1, push_bytes // size)
    target = np.ones_like(array)
    pushed, copied, digested, same, others, single = [], [], [], [], [], []
    by_kernel, streams = list[float](), list[float]()

    def scattered() -> tuple[list[int], list[int]]:
        found = [rng.permutation(num_blocks)[:count].tolist() for _ in range(2)]
        return found[0], found[1]

    for i in range(rounds + 1):
        # Blocks of its own for each, or the first would leave them in a cache for the next.
        src, dst = scattered()
        pushed.append(sender.push(3 * i, group, src, dst).seconds)
        src, dst = scattered()
        if pair.path.path is Path.SHM:
            here, there = array.ctypes.data, pair.remote_pools[group]
            spans = [(here + a * size, there + b * size, size) for a, b in zip(src, dst, strict=True)]
            began = time.perf_counter()
            write_into(pair.receiver_pid, spans)
            by_kernel.append(time.perf_counter() - began)
        src, dst = scattered()
        began = time.perf_counter()
        for a, b in zip(src, dst, strict=True):
            target[b * size : (b + 1) * size] = array[a * size : (a + 1) * size]
        copied.append(time.perf_counter() - began)
        began = time.perf_counter()
        digest = xxhash.xxh3_64()
        for a in src:
            digest.update(array[a * size : (a + 1) * size].data)
        digested.append(time.perf_counter() - began)
        same.append(sender.push(3 * i + 1, group, [0] * count, [1] * count).seconds)
        if i < args.perftest_rounds:
            found = ucx_perftest(
                args.ucx_perftest, size, 4 * push_bytes, transport.ucx, transport.namespaces, pair.path.path
            )
            others += [] if found is None else [found]
            stream = None if transport.namespaces is None else iperf3(transport.namespaces, 1)
            streams += [] if stream is None else [stream]
    pair.take_notes()
    for i in range(4 * rounds):
        time.sleep(0.01)  # the receiver is idle when the note comes
        single.append(sender.push(3 * i + 2, group, src[:1], dst[:1]).seconds)
    time.sleep(0.1)
    moved = count * size
    return Row(
        transport=transport.name,
        path=pair.path.path,
        block_kib=size >> 10,
        push_gb_per_s=_rate(moved, pushed[1:]),
        kernel_gb_per_s=_rate(moved, by_kernel[1:]) if by_kernel else None,
        memcpy_gb_per_s=_rate(moved, copied[1:]),
        one_gb_per_s=_rate(moved, same[1:]),
        perftest_gb_per_s=_best_and_median(others),
        iperf3_gb_per_s=_best_and_median(streams),
        digest_share=BestAndMedian(
            min(digested) / min(pushed[1:]), statistics.median(digested) / statistics.median(pushed[1:])
        ),
        one_block_us=_microseconds(single),
        note_us=_microseconds(list(pair.take_notes().values())),
    )


def _turns(transport: str, pair: Pair, order: str, round_of: int) -> Turns:
    """Blocks of 256 KiB. Served as they come when all of them are one flow."""
    group, sender = 1, pair.sender
    num_blocks = len(sender.arrays[group]) // BLOCK_BYTES[group]
    everything = list(range(num_blocks))
    fair = order == "in turns"
    first = 1_000_000 * (2 * round_of + fair + 1)
    began = time.monotonic()
    for i in range(HUGE_PUSHES):
        sender.submit(first + i, group, everything, everything, "huge" if fair else "")
    for i in range(SHORT_REQUESTS):
        blocks = [(SHORT_BLOCKS * i + k) % num_blocks for k in range(SHORT_BLOCKS)]
        sender.submit(first + 1000 + i, group, blocks, blocks, f"short {i}" if fair else "")
    ended: dict[int, float] = {}
    while len(ended) < HUGE_PUSHES + SHORT_REQUESTS:
        event = sender.wait()
        if not isinstance(event, PushEnded) or event.outcome is not Outcome.COMPLETED:
            raise RuntimeError(f"the push failed: {event}")
        ended[event.id] = time.monotonic() - began
    short = [at for push_id, at in ended.items() if push_id >= first + 1000]
    return Turns(
        transport=transport,
        order=order,
        huge_mib=HUGE_PUSHES * len(sender.arrays[group]) >> 20,
        short_p50_ms=1e3 * statistics.median(short),
        short_last_ms=1e3 * max(short),
        huge_ms=1e3 * max(at for push_id, at in ended.items() if push_id < first + 1000),
    )


def _best_and_median(rates: Sequence[float]) -> BestAndMedian | None:
    return BestAndMedian(max(rates), statistics.median(rates)) if rates else None


def _rate(size_bytes: int, seconds: Sequence[float]) -> BestAndMedian:
    return BestAndMedian(size_bytes / min(seconds) / 1e9, size_bytes / statistics.median(seconds) / 1e9)


def _microseconds(seconds: Sequence[float]) -> BestAndMedian:
    return BestAndMedian(min(seconds) * 1e6, statistics.median(seconds) * 1e6)


def _idle_share(pid: int) -> float:
    process = psutil.Process(pid)
    before = process.cpu_times()
    time.sleep(IDLE_S)
    after = process.cpu_times()
    return round((after.user + after.system - before.user - before.system) / IDLE_S, 4)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| transport | path | block KiB | push GB/s | kernel GB/s | memcpy GB/s "
        "| one block over and over GB/s | ucx_perftest GB/s "
        "| iperf3 GB/s | digest / push | one block us | block + note us |",
        "|" + "---|" * 12,
    ]
    lines += [
        f"| {r.transport} | {r.path} | {r.block_kib} | {r.push_gb_per_s} "
        f"| {r.kernel_gb_per_s or '-'} | {r.memcpy_gb_per_s} "
        f"| {r.one_gb_per_s} | {r.perftest_gb_per_s or '-'} "
        f"| {r.iperf3_gb_per_s or '-'} | {r.digest_share} "
        f"| {r.one_block_us} | {r.note_us} |"
        for r in rows
    ]
    return "\n".join(lines)


def turns_table(turns: Sequence[Turns]) -> str:
    lines = [
        "| transport | order | huge request MiB | short p50 ms | last short ms | huge ms |",
        "|" + "---|" * 6,
    ]
    lines += [
        f"| {t.transport} | {t.order} | {t.huge_mib} | {t.short_p50_ms:.0f} | {t.short_last_ms:.0f} "
        f"| {t.huge_ms:.0f} |"
        for t in turns
    ]
    return "\n".join(lines)


@contextmanager
def transports(*, namespaces: bool) -> Iterator[list[Transport]]:
    on_host = [
        Transport(name="default", ucx={}),
        Transport(name="tcp, loopback", ucx={"TLS": "tcp", "NET_DEVICES": "lo"}),
    ]
    if not namespaces:
        yield on_host
        return
    with two_namespaces() as names:
        ucx = {"TLS": "tcp", "NET_DEVICES": DEVICE}
        yield [*on_host, Transport(name=TWO_NAMESPACES, ucx=ucx, namespaces=names)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=File, help="where to write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--push-mib", type=int, default=32, help="bytes of one push")
    parser.add_argument("--pool-mib", type=int, default=64, help="bytes of one pool")
    parser.add_argument("--transports", default="", help="only those with this in their name")
    parser.add_argument("--ucx-perftest", default="ucx_perftest", help="program to run, if it is there")
    parser.add_argument("--perftest-rounds", type=int, default=3)
    args = parser.parse_args()
    environment = describe_environment()
    measured: dict[str, Measured] = {}
    with transports(namespaces=available() and args.transports in TWO_NAMESPACES) as chosen:
        for transport in chosen:
            if args.transports not in transport.name:
                continue
            # A process of its own each: UCX keeps what it once found out about the machine.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                measured[transport.name] = fresh.submit(measure, transport, args).result()
    rows = [row for one in measured.values() for row in one.rows]
    turns = [turn for one in measured.values() for turn in one.turns]
    print(json.dumps(dataclasses.asdict(environment)))
    print(f"rounds {args.rounds}, push {args.push_mib} MiB, pool {args.pool_mib} MiB; best / median\n")
    print(table(rows))
    print(f"\n{turns_table(turns)}\n")
    for name, one in measured.items():
        print(f"{name}: idle receiver {one.idle_share:.2%} of a core; probe at connect {one.probe}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": dataclasses.asdict(environment),
            "config": {"rounds": args.rounds, "push_mib": args.push_mib, "pool_mib": args.pool_mib},
            "measured": {name: dataclasses.asdict(one) for name, one in measured.items()},
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
