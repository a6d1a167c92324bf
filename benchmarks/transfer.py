"""How fast KV blocks move between two processes, beside what others reach in the same run.

    python -m benchmarks.transfer --output build/transfer.json      (and build/transfer.md)

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
100 short requests wait behind a huge one, with and without taking turns; then how much of the transfer of a
prompt of 2k to 32k tokens is exposed (`benchmarks.transfer_exposed`), and last what was aimed at.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path as File
from typing import Final

import numpy as np
import numpy.typing as npt
import psutil
import xxhash

from benchmarks import transfer_exposed
from benchmarks.environment import describe_environment
from benchmarks.network_namespaces import available
from benchmarks.transfer_pair import (
    BLOCK_BYTES,
    LOOPBACK,
    TWO_NAMESPACES,
    Pair,
    Transport,
    connected,
    transports,
)
from benchmarks.transfer_report import BestAndMedian, Measured, Row, Turns, markdown, targets_of
from benchmarks.transfer_tools import iperf3, ucx_perftest, write_into
from kvtransfer.protocol import Outcome, Path, PushEnded

Bytes = npt.NDArray[np.uint8]

IDLE_S: Final = 3.0
SHORT_REQUESTS: Final = 100
SHORT_BLOCKS: Final = 4
HUGE_PUSHES: Final = 16
SLOWER_TOKENS_PER_S: Final = 4000.0
"""An 8B cache grows by 0.5 GB/s then."""


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
        return Measured(rows=rows, turns=turns, exposed=[], idle_share=idle, probe=pair.path)


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
        copied.append(_memcpy_s(array, target, src, dst, size))
        digested.append(_digest_s(array, src, size))
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


def _memcpy_s(array: Bytes, target: Bytes, src: Sequence[int], dst: Sequence[int], size: int) -> float:
    began = time.perf_counter()
    for a, b in zip(src, dst, strict=True):
        target[b * size : (b + 1) * size] = array[a * size : (a + 1) * size]
    return time.perf_counter() - began


def _digest_s(array: Bytes, blocks: Sequence[int], size: int) -> float:
    began = time.perf_counter()
    digest = xxhash.xxh3_64()
    for block in blocks:
        digest.update(array[block * size : (block + 1) * size].data)
    return time.perf_counter() - began


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


def _exposed(transport: Transport) -> list[transfer_exposed.Exposed]:
    """Of prompts as long as the target is about; over TCP also where the link can follow the accelerator."""
    lengths = (2048, 8192, 16384, 32768)
    plans = [transfer_exposed.Plan(lengths=lengths, concurrent=(1,))]
    if transport.ucx:
        plans = [
            transfer_exposed.Plan(lengths=lengths[:2], concurrent=(1,)),
            transfer_exposed.Plan(
                lengths=lengths, concurrent=(1,), rounds=2, tokens_per_s=SLOWER_TOKENS_PER_S
            ),
        ]
    return [row for plan in plans for row in transfer_exposed.measured_alone(transport, plan)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=File, help="where to write the figures: JSON, and Markdown beside it"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--push-mib", type=int, default=32, help="bytes of one push")
    parser.add_argument("--pool-mib", type=int, default=64, help="bytes of one pool")
    parser.add_argument("--transports", default="", help="only those with this in their name")
    parser.add_argument("--ucx-perftest", default="ucx_perftest", help="program to run, if it is there")
    parser.add_argument("--perftest-rounds", type=int, default=4)
    args = parser.parse_args()
    environment = dataclasses.asdict(describe_environment())
    measured: dict[str, Measured] = {}
    with transports(namespaces=available() and args.transports in TWO_NAMESPACES) as chosen:
        for transport in chosen:
            if args.transports not in transport.name:
                continue
            # A process of its own each: UCX keeps what it once found out about the machine.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                found = fresh.submit(measure, transport, args).result()
            exposed = [] if transport.name == LOOPBACK else _exposed(transport)
            measured[transport.name] = dataclasses.replace(found, exposed=exposed)
    config = {"rounds": args.rounds, "push_mib": args.push_mib, "pool_mib": args.pool_mib}
    text = markdown(json.dumps(environment), json.dumps(config), measured)
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".md").write_text(text)
        result = {
            "environment": environment,
            "config": config,
            "measured": {name: dataclasses.asdict(one) for name, one in measured.items()},
            "targets": [dataclasses.asdict(one) for one in targets_of(measured)],
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
