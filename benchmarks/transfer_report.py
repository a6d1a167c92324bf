"""What `benchmarks.transfer` found, as tables, and beside what was aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.transfer_exposed import Exposed
from benchmarks.transfer_exposed import table as exposed_table
from benchmarks.transfer_pair import TWO_NAMESPACES
from kvtransfer.protocol import Path, PathInfo

TARGET_BLOCK_KIB: Final = 256
TARGET_SHARE: Final = 0.9
"""Of what the same transport reaches in ucx_perftest over shared memory, of iperf3 over TCP."""
TARGET_EXPOSED: Final = 0.05
"""Of the TTFT at most, of prompts from `EXPOSED_FROM` tokens on."""
EXPOSED_FROM: Final = 2048


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
    exposed: list[Exposed]
    idle_share: float
    """Of a core, by the idle, connected receiver."""
    probe: PathInfo


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    what: str
    wanted: str
    best: float
    median: float
    met: bool
    """Rates by the best of the rounds, as a busy machine's median is the scheduler's; exposed time by the
    median."""


def targets(rows: Sequence[Row], exposed: Sequence[Exposed]) -> list[Target]:
    """What was aimed at and could be measured here."""
    found = []
    for row in rows:
        if row.block_kib != TARGET_BLOCK_KIB:
            continue
        pairs = []
        if row.path is Path.SHM and row.perftest_gb_per_s is not None:
            pairs = [("one block over and over", row.one_gb_per_s, "ucx_perftest", row.perftest_gb_per_s)]
        if row.transport == TWO_NAMESPACES and row.iperf3_gb_per_s is not None:
            pairs = [
                ("scattered blocks", row.push_gb_per_s, "iperf3", row.iperf3_gb_per_s),
                ("one block over and over", row.one_gb_per_s, "iperf3", row.iperf3_gb_per_s),
            ]
        for what, ours, other, theirs in pairs:
            best, median = ours.best / theirs.best, ours.median / theirs.median
            found.append(
                Target(
                    what=f"{row.transport}: {what}, {row.block_kib} KiB, of {other}",
                    wanted=f">= {TARGET_SHARE:.0%}",
                    best=best,
                    median=median,
                    met=best >= TARGET_SHARE,
                )
            )
    found += [
        Target(
            what=f"{one.transport}: exposed of the TTFT, {one.prompt_tokens} tokens"
            f" at {one.tokens_per_s:,.0f} tokens/s",
            wanted=f"<= {TARGET_EXPOSED:.0%}",
            best=one.best_share,
            median=one.share,
            met=one.share <= TARGET_EXPOSED,
        )
        for one in exposed
        if one.prompt_tokens >= EXPOSED_FROM and one.concurrent == 1
    ]
    return found


def targets_table(found: Sequence[Target]) -> str:
    lines = ["| target | wanted | best | median | met |", "|" + "---|" * 5]
    lines += [
        f"| {t.what} | {t.wanted} | {t.best:.1%} | {t.median:.1%} | {'yes' if t.met else 'no'} |"
        for t in found
    ]
    return "\n".join(lines)


def targets_of(measured: dict[str, Measured]) -> list[Target]:
    every = measured.values()
    return targets([row for one in every for row in one.rows], [row for one in every for row in one.exposed])


def markdown(environment: str, config: str, measured: dict[str, Measured]) -> str:
    """The whole report."""
    rows = [row for one in measured.values() for row in one.rows]
    turns = [turn for one in measured.values() for turn in one.turns]
    exposed = [row for one in measured.values() for row in one.exposed]
    parts = [environment, f"{config}; best / median", table(rows), turns_table(turns)]
    parts += [exposed_table(exposed)] if exposed else []
    parts.append(targets_table(targets_of(measured)))
    parts += [
        f"{name}: idle receiver {one.idle_share:.2%} of a core; probe at connect {one.probe}"
        for name, one in measured.items()
    ]
    return "\n\n".join(parts) + "\n"
