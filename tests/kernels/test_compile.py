"""Every kernel compiles for Hopper and Ampere without a GPU: no spills, shared memory within the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import REPO

triton = pytest.importorskip("triton")


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The compile report in a process of its own: this one may be interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    command = [sys.executable, "-m", "pdkernels.report", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    done = report("--json", "--quick")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_compiles_for_hopper_and_ampere_without_faults(rows: list[dict[str, Any]]) -> None:
    kernels = {row["kernel"] for row in rows}
    assert {"prefill_kernel", "decode_kernel", "reduce_kernel", "rope_and_write_kernel"} <= kernels
    for kernel in kernels:
        assert {row["target"] for row in rows if row["kernel"] == kernel} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit_bytes"], row


def test_no_kernel_of_the_modules_is_left_out(rows: list[dict[str, Any]]) -> None:
    source = "".join(path.read_text() for path in (REPO / "kernels/pdkernels").glob("*.py"))
    written = {line[4:].split("(")[0] for line in source.splitlines() if line.startswith("def ")}
    assert {name for name in written if name.endswith("_kernel")} == {row["kernel"] for row in rows}


def test_prefill_uses_the_matrix_unit_of_each_generation(rows: list[dict[str, Any]]) -> None:
    units = {
        (row["target"], row["matrix_unit"])
        for row in rows
        if row["kernel"] == "prefill_kernel" and "bf16" in row["case"]
    }
    assert units == {("sm_90", "wgmma"), ("sm_80", "mma")}


def test_what_is_bound_by_memory_reads_sixteen_bytes_at_once(rows: list[dict[str, Any]]) -> None:
    bound = {
        "rms_norm_kernel",
        "add_rms_norm_kernel",
        "silu_mul_kernel",
        "decode_kernel",
        "copy_blocks_kernel",
        "digest_kernel",
    }
    for row in rows:
        # Tiles of an FP8 cache have half of the bytes, and are read by as many threads.
        if row["kernel"] in bound and "FP8 cache" not in row["case"]:
            assert row["read_bytes"] == 16, row


@pytest.mark.slow
def test_the_page_of_the_docs_is_current(tmp_path: Any) -> None:
    page = REPO / "docs/kernels.md"
    if f"Triton {triton.__version__}," not in page.read_text():
        pytest.skip("docs/kernels.md was written with another Triton")
    fresh = tmp_path / "kernels.md"
    done = report("--out", str(fresh))
    assert done.returncode == 0, done.stderr
    assert fresh.read_text() == page.read_text()
