"""How near a computation comes to its machine: bytes, operations, time, and the floor that both set.

The floor of a row is the slower of its bytes at the memory's rate and its operations at the matrix rate, both
rates measured in the same run on the same threads. All that is compared takes turns, and the best of each
counts: other processes make a turn slower, never faster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.environment import Environment, describe_environment

MEMORY_BYTES: Final = 2**28
MATRIX_SIZE: Final = 2048
FLOOR_TURNS: Final = 6
BUDGET_S: Final = 20.0

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Floors:
    bytes_per_s: float
    """The best of a large copy (read and written bytes) and a large read."""
    flops_per_s: float
    """A large bfloat16 matrix product."""

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    case: str
    by: str
    """Whose computation."""
    threads: int
    num_bytes: float
    """What it cannot avoid to read and write, were every input read once."""
    flops: float
    seconds: float
    floor_s: float

    @property
    def of_floor(self) -> float:
        """1: as fast as the machine allows."""
        return self.floor_s / self.seconds

    @property
    def line(self) -> str:
        taken = f"{self.seconds * 1e3:.3f} ms, {self.of_floor:.0%} of the floor"
        return f"{self.case}, {self.by}, {self.threads} thread(s): {taken}"


def measure_floors(device: torch.device) -> Floors:
    words = MEMORY_BYTES // 4
    source, target = torch.ones(words, device=device), torch.empty(words, device=device)
    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).bfloat16()
    b = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).bfloat16()
    best = best_of(
        {
            "copy": lambda: target.copy_(source),
            "read": lambda: torch.dot(source, target),
            "product": lambda: a @ b,
        },
        FLOOR_TURNS,
        device,
    )
    memory = max(2 * MEMORY_BYTES / best["copy"], 2 * MEMORY_BYTES / best["read"])
    return Floors(memory, 2 * MATRIX_SIZE**3 / best["product"])


def best_of(works: Mapping[str, Work], turns: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, the best of `turns` after one that does not count; they take turns.

    Fewer turns, but one at least, where they would take longer than `BUDGET_S` together.
    """
    best = dict.fromkeys(works, float("inf"))
    began = time.perf_counter()
    for turn in range(turns + 1):
        for name, work in works.items():
            seconds = _seconds(work, device)
            if turn:
                best[name] = min(best[name], seconds)
        if turn and time.perf_counter() - began > BUDGET_S:
            break
    return best


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| case | by | threads | MB | GFLOP | ms | GB/s | GFLOP/s | of the floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.case} | {r.by} | {r.threads} | {r.num_bytes / 1e6:.4g} | {r.flops / 1e9:.3g} "
        f"| {r.seconds * 1e3:.3f} | {r.num_bytes / r.seconds / 1e9:.1f} | {r.flops / r.seconds / 1e9:.0f} "
        f"| {r.of_floor:.0%} |"
        for r in rows
    ]
    return "\n".join(lines)


def write(out: Path, title: str, command: str, floors: Mapping[int, Floors], rows: Sequence[Row]) -> str:
    """`out`.json and `out`.md; returns the Markdown."""
    environment = describe_environment()
    text = "\n".join([f"# {title}", "", *_about(environment, command, floors), "", table(rows), ""])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    report = {
        "environment": asdict(environment),
        "command": command,
        "floors": {str(threads): asdict(floor) for threads, floor in floors.items()},
        "rows": [{**asdict(row), "of_floor": row.of_floor} for row in rows],
    }
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    return text


def _about(environment: Environment, command: str, floors: Mapping[int, Floors]) -> list[str]:
    e = environment
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{e.cpu}, {e.cores} cores"
    changed = " with uncommitted changes" if e.uncommitted_changes else ""
    lines = [
        f"- commit {e.commit}{changed}; {e.started}; load average after the run {e.load_before}",
        f"- {device} ({', '.join(e.cpu_flags)}), torch {torch.__version__}",
        f"- command: `{command}`; all that is compared in turn, the best of each",
    ]
    for threads, floor in floors.items():
        rates = f"{floor.bytes_per_s / 1e9:.1f} GB/s, {floor.flops_per_s / 1e9:.0f} GFLOP/s"
        lines.append(f"- floors with {threads} thread(s): {rates}")
    return lines
