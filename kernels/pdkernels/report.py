"""Compile every kernel for GPUs that are not here, and report what the assembler says.

    python -m pdkernels.report            writes docs/kernels.md
    python -m pdkernels.report --json     prints the rows instead; with --quick those of the short list

Exit status 1 when a kernel spills registers or asks for more shared memory than the GPU has. Needs Triton,
no GPU, and no TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pdkernels import (
    activation,
    blocks,
    compile_cases,
    decode_attention,
    digest,
    fp8_matmul,
    grouped_matmul,
    norm,
    prefill_attention,
    rope,
    sampling,
    split_k,
    tuning,
    w4a16,
)
from pdkernels._triton import Grid, Kernel, triton

MODULES: Final = (
    norm,
    activation,
    grouped_matmul,
    w4a16,
    fp8_matmul,
    split_k,
    rope,
    decode_attention,
    prefill_attention,
    blocks,
    digest,
    sampling,
)
LAUNCH_OPTIONS: Final = ("num_warps", "num_stages")
POINTERS: Final = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class Target:
    capability: int
    ptxas_name: str
    gpus: str
    shared_limit_bytes: int
    """Most dynamic shared memory of one block."""


TARGETS: Final = (
    Target(90, "sm_90a", "H100, H200", 232448),
    Target(80, "sm_80", "A100", 166912),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One compiled launch."""

    kernel: str
    case: str
    target: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    matrix_unit: str
    """Which instructions do the products: wgmma, mma, or none (fp32 fused multiply-adds)."""
    read_bytes: int
    """Of global memory, by one thread at once: of most asynchronous copies, else of the widest load."""

    @property
    def fault(self) -> str | None:
        if self.spill_bytes:
            return f"{self.spill_bytes} bytes of register spills"
        if self.shared_bytes > self.shared_limit_bytes:
            return f"{self.shared_bytes} bytes of shared memory, {self.shared_limit_bytes} exist"
        return None


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def launches(call: Callable[[], object], target: Target) -> list[Launch]:
    """What `call` would launch on `target`; nothing runs."""
    found: list[Launch] = []
    token = tuning.assumed_capability.set(target.capability // 10)
    try:
        with _recording(found):
            call()
    finally:
        tuning.assumed_capability.reset(token)
    return found


class _Recorder:
    def __init__(self, kernel: Kernel, found: list[Launch]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._found.append(Launch(self._kernel, args, kwargs))

        return launch


@contextmanager
def _recording(found: list[Launch]) -> Iterator[None]:
    replaced: list[tuple[Any, str, Kernel]] = []
    for module in MODULES:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction):
                replaced.append((module, name, value))
    for module, name, kernel in replaced:
        setattr(module, name, _Recorder(kernel, found))
    try:
        yield
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


def compile_launch(launch: Launch, case: str, target: Target) -> Row:
    """Compile as Triton would at this launch: the same constants, types and known alignments."""
    source = triton.compiler.ASTSource(launch.kernel, *_specialise(launch))
    options = {name: launch.kwargs[name] for name in LAUNCH_OPTIONS if name in launch.kwargs}
    compiled = triton.compile(
        source, target=triton.backends.compiler.GPUTarget("cuda", target.capability, 32), options=options
    )
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, target)
    return Row(
        kernel=launch.kernel.__name__,
        case=case,
        target=f"sm_{target.capability}",
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=target.shared_limit_bytes,
        read_bytes=_read_bytes(ptx),
        matrix_unit="wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "none",
    )


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes of a launch, as the runtime derives them from its arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    positional = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = positional[name] if name in positional else launch.kwargs[name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def _assemble(ptx: str, target: Target) -> tuple[int, int]:
    """Registers per thread and bytes spilled (stores + loads), as ptxas reports them."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name={target.ptxas_name}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    registers = re.search(r"Used (\d+) registers", done.stderr)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas said nothing of registers: {done.stderr}")
    return int(registers[1]), sum(spills)


def _read_bytes(ptx: str) -> int:
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \S.*?\], \[.*?\], 0x([0-9a-f]+)", ptx)
    if copies:
        size, _ = Counter(copies).most_common(1)[0]
        return int(size, 16)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0)


def compile_cases_of(cases: Iterable[compile_cases.Case]) -> list[Row]:
    return [
        compile_launch(launch, case.name, target)
        for case in cases
        for target in TARGETS
        for launch in launches(case.call, target)
    ]


HEADER: Final = """# Kernels: registers, spills, shared memory

Written by `python -m pdkernels.report`; do not edit. Triton {triton}, the assembler it brings.

The CPU's kernels have a page of their own: [cpu-kernels.md](cpu-kernels.md).

These are facts of compilation, found without a GPU: every kernel below compiles for the GPU named, spills
nothing and fits its shared memory. **Nothing on this page was run or timed on a GPU.** Correctness is proved
by the tests in `tests/kernels` under Triton's interpreter, in float32 and float16; bfloat16, and anything
that only hardware shows (races, alignment, speed), is left to the same tests on a GPU: `pytest -m gpu
tests/kernels`. The launch configurations in `pdkernels/tuning.py` are starting points, not measured.

| op | module | what it does |
|---|---|---|
| rms_norm, add_rms_norm | `norm` | RMSNorm of rows or heads; fused with the residual addition |
| silu_mul | `activation` | SwiGLU's elementwise half |
| grouped_matmul | `grouped_matmul` | products of a mixture of experts, every row with its own weight |
| w4_matmul | `w4a16` | product with 4-bit weights in groups (AWQ, GPTQ), with or without zero points |
| fp8_matmul | `fp8_matmul` | product with FP8 weights, scaled by tensor, output or block |
| rope_and_write | `rope` | norm per head (optional), rotation, and the write into KV blocks, one pass |
| prefill_attention | `prefill_attention` | causal, ragged, chunked, over KV blocks; window, soft cap |
| decode_attention | `decode_attention` | one token per sequence, KV split by plan, joined by log-sum-exp |
| gather_blocks, scatter_blocks | `blocks` | pack and unpack KV blocks, by layers and heads |
| digest_pieces | `digest` | a digest of what a push sends, and of what arrived |
| adjust_logits, sample | `sampling` | penalties; temperature, min-p, top-k, top-p without a sort; the draw |

Each op's reference is the module of the same name in `pdkernels/reference` (both attentions: `attention`).
Attention work is cut on the host, once per step, by `pdkernels/plan.py`. The split of a sequence follows from
the lengths of the whole batch, so the last bits of a result may change with the batch. The inputs of a
product with few rows are split over programs and their parts added in one order (`split_k`).

Shared memory limits: {limits}. "read B" is how much a thread reads of global memory at once (of most
asynchronous copies, or else of the widest load); 16 is the most there is.

| kernel | case | GPU | warps | stages | registers | spills B | shared B | read B | matrix unit |
|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(rows: list[Row]) -> str:
    limits = ", ".join(f"sm_{t.capability} ({t.gpus}) {t.shared_limit_bytes} B" for t in TARGETS)
    lines = [
        f"| {r.kernel} | {r.case} | {r.target} | {r.num_warps} | {r.num_stages} | {r.registers} "
        f"| {r.spill_bytes} | {r.shared_bytes} | {r.read_bytes} | {r.matrix_unit} |\n"
        for r in rows
    ]
    return HEADER.format(triton=triton.__version__, limits=limits) + "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows instead of writing the page")
    parser.add_argument("--quick", action="store_true", help="only the short list of cases")
    parser.add_argument("--out", type=Path, default=Path("docs/kernels.md"))
    options = parser.parse_args()
    cases = [case for case in compile_cases.cases() if case.quick or not options.quick]
    rows = compile_cases_of(cases)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown(rows))
    faults = [f"{row.kernel} ({row.case}, {row.target}): {row.fault}" for row in rows if row.fault]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
