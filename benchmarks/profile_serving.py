"""Where pdserve's time goes while it answers the benchmark's concurrent streams.

    python -m benchmarks.profile_serving --out docs/profile-serving.md

py-spy samples every Python process of the deployment from outside, 100 times a second, at once. What a
thread's samples say is scaled to the CPU time that the kernel counted for that thread, so that a thread that
mostly waits weighs little. py-spy needs the right to trace the processes: run as the same user where the
kernel allows it (kernel.yama.ptrace_scope=0), or as root.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
NATIVE_THREADS: Final = "threads without Python (OpenMP, network, Ray)"
_THREAD: Final = re.compile(r"thread \((\d+)\)")
OUR_FOLDERS: Final = ("pdserve/", "prefill/", "decode/", "kvtransfer/", "coordinator/", "pdkernels/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """CPU seconds of one process by Python function."""

    own_s: Mapping[str, float]
    """By innermost function, native code it called included."""
    inclusive_s: Mapping[str, float]
    """By every function of ours on the stack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessProfile:
    title: str
    cpu_s: float
    cores: float
    """Cores it kept busy while sampled, by the kernel's count."""
    attribution: Attribution


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
    folder = system.setup.log_dir
    before = {process.pid: thread_cpu_s(process) for process in members}
    began_s = time.perf_counter()
    recorders = [await _record(one.pid, folder, seconds) for one in members if _is_python(one)]
    await asyncio.sleep(max(0.0, began_s + seconds - time.perf_counter()))
    wall_s = time.perf_counter() - began_s
    after = {process.pid: thread_cpu_s(process) for process in members}
    for recorder in recorders:
        await asyncio.wait_for(recorder.wait(), timeout=60.0)
    profiles = []
    for process in members:
        cpu_s = {
            thread: used - before[process.pid].get(thread, 0.0) for thread, used in after[process.pid].items()
        }
        total_s = sum(cpu_s.values())
        profiles.append(
            ProcessProfile(
                title=_title(process),
                cpu_s=total_s,
                cores=total_s / wall_s,
                attribution=attribute(_raw_lines(folder, process.pid), cpu_s),
            )
        )
    return sorted(profiles, key=lambda one: -one.cores), wall_s


async def _record(pid: int, folder: Path, seconds: float) -> asyncio.subprocess.Process:
    argv = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(pid), "--format", "raw"]
    argv += [
        "--function",
        "--threads",
        "--nonblocking",
        "--rate",
        str(RATE_HZ),
        "--duration",
        str(round(seconds)),
    ]
    argv += ["--output", str(_raw_path(folder, pid))]
    with (folder / "py-spy.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log)


def _raw_path(folder: Path, pid: int) -> Path:
    return folder / f"py-spy-{pid}.txt"


def _raw_lines(folder: Path, pid: int) -> list[str]:
    path = _raw_path(folder, pid)
    return path.read_text().splitlines() if path.exists() else []


def attribute(lines: Iterable[str], cpu_s: Mapping[int, float]) -> Attribution:
    """CPU seconds by function, from py-spy's raw format and each thread's CPU seconds.

    A line is `thread (ID): name;outermost;...;innermost COUNT`. A thread's seconds are shared out among its
    functions by their counts. Threads that py-spy never saw run Python hold native code alone.
    """
    counts: dict[int, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for line in lines:
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        found = _THREAD.match(thread)
        if found and frames:
            counts[int(found[1])][tuple(frames)] += int(count)
    own: dict[str, float] = defaultdict(float)
    inclusive: dict[str, float] = defaultdict(float)
    for thread_id, used_s in cpu_s.items():
        if thread_id not in counts:
            own[NATIVE_THREADS] += used_s
            continue
        total = counts[thread_id].total()
        for path, num_seen in counts[thread_id].items():
            share_s = used_s * num_seen / total
            own[path[-1]] += share_s
            for frame in {frame for frame in path if any(folder in frame for folder in OUR_FOLDERS)}:
                inclusive[frame] += share_s
    return Attribution(own_s=own, inclusive_s=inclusive)


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
        if one.attribution.inclusive_s:
            parts += [f"### {one.title}", "Own time, by innermost Python function:"]
            parts += [
                _top(one, one.attribution.own_s),
                "Time inside pdserve's functions, what they call included:",
            ]
            parts += [_top(one, one.attribution.inclusive_s)]
    return parts


def _top(one: ProcessProfile, seconds: Mapping[str, float]) -> str:
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:TOP]
    rows = [[f"`{name}`", f"{used_s / one.cpu_s:.1%}"] for name, used_s in ranked]
    return markdown_table(["function", "of the process's CPU time"], rows)


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


def thread_cpu_s(process: psutil.Process) -> dict[int, float]:
    """CPU seconds so far by thread id; empty when the process is gone."""
    try:
        return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    except psutil.NoSuchProcess:
        return {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_serving", description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="as for `pdserve serve`")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to sample each deployment")
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
