"""The tables of the engine and of its kernels, on a shape that takes no time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pdcpu.build import KernelsUnavailable
from pdcpu.library import load

from benchmarks import engine, floors, kernels
from benchmarks.floors import Floors, Row
from benchmarks.shapes import Shape

TINY = Shape(name="tiny", hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, ff=64, vocab=2048, tied=True)
RATES = Floors(bytes_per_s=1e10, flops_per_s=1e11)


def test_every_step_is_measured_for_pdserve_and_transformers() -> None:
    rows = list(engine.measure(TINY, 1, RATES, torch.device("cpu"), peers=True, turns=1))
    assert {row.by for row in rows} >= {"pdserve", "transformers"}
    assert len(rows) >= 2 * len(engine.CASES)
    assert all(math.isfinite(row.seconds) and row.seconds > 0 for row in rows)


def test_every_kernel_is_measured_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        library = load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(kernels, "CYCLED_BYTES", 2**16)
    monkeypatch.setattr(kernels, "ROWS", (1, 16))
    rows = list(kernels.measure(TINY, 1, RATES, library, turns=1))
    assert {"pdcpu", "torch, SDPA"} <= {row.by for row in rows}
    assert len({row.case for row in rows}) == 2 * 4 + 5


def test_a_floor_is_the_slower_of_bytes_and_operations() -> None:
    assert RATES.seconds(1e10, 1e9) == 1.0
    assert RATES.seconds(1.0, 2e11) == 2.0


def test_what_is_counted_is_what_a_step_cannot_avoid() -> None:
    one = engine.Case("one", 1, 9, 1)
    weights = TINY.layers * (64 * (64 + 64) + 64 * 64 + 128 * 64 + 64 * 64) + 2048 * 64
    assert one.num_bytes(TINY) == 2 * weights + 10 * (2 * 2 * 2 * 32)
    assert one.flops(TINY) == 2 * weights + 4 * 2 * 2 * 32 * 10


def test_the_table_is_written_for_people_and_machines(tmp_path: Path) -> None:
    row = Row(case="c", by="b", threads=2, num_bytes=4e6, flops=1e9, seconds=2e-3, floor_s=1e-3)
    text = floors.write(tmp_path / "t", "Title", "the command", {2: RATES}, [row])
    assert "| c | b | 2 | 4 | 1 | 2.000 | 2.0 | 500 | 50% |" in text
    assert (tmp_path / "t.md").read_text() == text
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["rows"][0]["of_floor"] == 0.5
    assert report["command"] == "the command"
