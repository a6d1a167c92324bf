"""Where pdserve's time goes while it answers the benchmark's concurrent streams.

    python -m benchmarks.profile_serving --out docs/profile-serving.md

py-spy samples every Python process of the deployment from outside, 100 times a second, at once. It needs the
right to trace them: run as the same user where the kernel allows it (kernel.yama.ptrace_scope=0), or as root.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.environment import REPO, describe_environment
from benchmarks.measure import run_round
from benchmarks.processes import reaping_orphans
from benchmarks.report import markdown_table
from benchmarks.serving import make_setup
from benchmarks.system import System
from benchmarks.systems.pdserve import PdserveColocated, PdserveDisaggregated
from benchmarks.workload import FULL, QUICK, PromptSource, Workload

RATE_HZ: Final = 100
TOP: Final = 15
BUSY_CORES: Final = 0.02
"""Processes below this share of a core are summed up in one line."""
OUR_FOLDERS: Final = ("pdserve/", "prefill/", "decode/", "kvtransfer/", "coordinator/", "pdkernels/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessProfile:
    """Samples of one process: a sample is one thread that was running Python or native code it called."""

    title: str
    cores: float
    """Cores it kept busy, by the kernel's count."""
    own: Counter[str]
    """Samples by innermost function."""
    inclusive: Counter[str]
    """Samples by every function of ours on the stack."""
    num_samples: int


async def profile(system: System, workload: Workload, prompts: PromptSource, *, seconds: float) -> list[str]:
    """Start, warm up, then sample for `seconds` under load. Returns Markdown parts; raises `ServerDied`."""
    try:
        await system.start()
        await run_round(system, QUICK, prompts, key="profile-warm-up")
        load = asyncio.create_task(_keep_busy(system, workload, prompts))
        try:
            profiles, wall_s = await _sample(system, seconds)
        finally:
            load.cancel()
            done = (await asyncio.gather(load, return_exceptions=True))[0]
        if isinstance(done, Exception):
            raise done
    finally:
        await system.stop()
    return _report(system, profiles, wall_s)


async def _keep_busy(system: System, workload: Workload, prompts: PromptSource) -> None:
    """Batches of concurrent streams, one after the other, until cancelled."""
    batch = 0
    while True:
        asked = [
            prompts.make(workload.stream_prompt_tokens, "profile", batch, index)
            for index in range(workload.streams)
        ]
        await system.answer_all(asked, workload.stream_output_tokens)
        batch += 1


async def _sample(system: System, seconds: float) -> tuple[list[ProcessProfile], float]:
    members = system.processes.members()
    before = {process.pid: _cpu_s(process) for process in members}
    began_s = time.perf_counter()
    folder = system.setup.log_dir
    pythons = [process for process in members if _is_python(process)]
    recorders = [await _record(process.pid, folder, seconds) for process in pythons]
    for recorder in recorders:
        await asyncio.wait_for(recorder.wait(), timeout=seconds + 60.0)
    wall_s = time.perf_counter() - began_s
    profiles = []
    for process in members:
        own, inclusive, num_samples = _read(_raw_path(folder, process.pid))
        cores = (_cpu_s(process) - before[process.pid]) / wall_s
        profiles.append(
            ProcessProfile(
                title=_title(process), cores=cores, own=own, inclusive=inclusive, num_samples=num_samples
            )
        )
    return sorted(profiles, key=lambda one: -one.cores), wall_s


async def _record(pid: int, folder: Path, seconds: float) -> asyncio.subprocess.Process:
    argv = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid), "--format", "raw"]
    argv += ["--function", "--nonblocking", "--rate", str(RATE_HZ), "--duration", str(round(seconds))]
    argv += ["--output", str(_raw_path(folder, pid))]
    with (folder / "py-spy.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log)


def _raw_path(folder: Path, pid: int) -> Path:
    return folder / f"py-spy-{pid}.txt"


def _read(path: Path) -> tuple[Counter[str], Counter[str], int]:
    """Own and inclusive samples from py-spy's raw format: `outer;...;inner count` per line."""
    own: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    if path.exists():
        for line in path.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            frames = stack.split(";")
            own[frames[-1]] += int(count)
            for frame in {frame for frame in frames if any(folder in frame for folder in OUR_FOLDERS)}:
                inclusive[frame] += int(count)
    return own, inclusive, own.total()


def _report(system: System, profiles: Sequence[ProcessProfile], wall_s: float) -> list[str]:
    busy = [one for one in profiles if one.cores >= BUSY_CORES]
    quiet = [one for one in profiles if one.cores < BUSY_CORES]
    rows = [[one.title, f"{one.cores:.2f}"] for one in busy]
    rows.append([f"{len(quiet)} others", f"{sum(one.cores for one in quiet):.2f}"])
    parts = [
        f"## {system.name}",
        f"{system.describes}. Sampled for {wall_s:.0f} s.",
        markdown_table(["process", "cores busy"], rows),
    ]
    for one in busy:
        if one.num_samples:
            parts += [f"### {one.title}", "Own time, by innermost Python function:", _top(one, one.own)]
            parts += ["Inclusive time of pdserve's functions:", _top(one, one.inclusive)]
    return parts


def _top(one: ProcessProfile, counter: Counter[str]) -> str:
    rows = [[f"`{frame}`", f"{count / one.num_samples:.1%}"] for frame, count in counter.most_common(TOP)]
    return markdown_table(["function", "of the samples"], rows)


def _title(process: psutil.Process) -> str:
    try:
        words = process.cmdline() or [process.name()]
    except psutil.NoSuchProcess:
        return "(ended)"
    if words[0].startswith("ray::") or len(words) == 1:
        return words[0]
    return " ".join([Path(words[0]).name, *(Path(word).name for word in words[1:3])])


def _is_python(process: psutil.Process) -> bool:
    try:
        return "python" in Path(process.exe()).name
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_serving", description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="as for `pdserve serve`")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to sample each deployment")
    parser.add_argument("--out", type=Path, default=REPO / "out" / "profile-serving.md")
    arguments = parser.parse_args()
    environment = describe_environment()
    setup = make_setup(arguments.model, FULL, log_dir=REPO / "out" / "profile-logs")
    setup.log_dir.mkdir(parents=True, exist_ok=True)
    prompts = PromptSource(setup.model_dir, seed=0)
    load = f"{FULL.streams} streams, {FULL.stream_prompt_tokens} in, {FULL.stream_output_tokens} out"
    parts = [
        "# Where the time goes",
        f"{setup.model_dir.name}, {load}, over and over. {environment.cpu}, {environment.cores} cores; "
        f"commit {environment.commit}; {environment.started}; load average before {environment.load_before}.",
    ]
    with reaping_orphans():
        for kind in (PdserveDisaggregated, PdserveColocated):
            parts += asyncio.run(profile(kind(setup), FULL, prompts, seconds=arguments.seconds))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n\n".join(parts) + "\n")
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
