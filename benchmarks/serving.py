"""pdserve and its peers on the same checkpoint, in turn, round after round.

    python -m benchmarks.serving --out out/bench
    python -m benchmarks.serving --quick --systems pdserve,vllm

See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.environment import REPO, describe_environment
from benchmarks.measure import run_round, start_and_warm_up
from benchmarks.processes import Command, allowed_cores, reaping_orphans
from benchmarks.report import GIB, Run, SystemResult, to_json, to_markdown
from benchmarks.system import Setup, System
from benchmarks.systems.llamacpp import LlamaCpp
from benchmarks.systems.pdserve import PdserveColocated, PdserveDisaggregated
from benchmarks.systems.transformers import TransformersGenerate, TransformersServe
from benchmarks.systems.vllm import Vllm, VllmDisaggregated
from benchmarks.workload import FULL, QUICK, PromptSource, Workload
from pdserve.models.store import resolve

SYSTEMS: Final[dict[str, type[System]]] = {
    kind.name: kind
    for kind in (
        PdserveDisaggregated,
        PdserveColocated,
        TransformersGenerate,
        TransformersServe,
        Vllm,
        VllmDisaggregated,
        LlamaCpp,
    )
}
RESERVED_GIB: Final = 2.0
"""Left to the machine and to this process when deciding what stays up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    systems: tuple[str, ...]
    workload: Workload
    num_rounds: int
    restart_always: bool
    seed: int


class Benchmark:
    """One run. A system that fails is recorded, stopped and left out from then on; the others go on."""

    def __init__(self, setup: Setup, options: Options) -> None:
        self._setup, self._options = setup, options
        self._prompts = PromptSource(setup.model_dir, seed=options.seed)
        kept = set() if options.restart_always else _kept_up(options.systems)
        self.results = {
            name: SystemResult(name=name, describes=SYSTEMS[name].describes, kept_up=name in kept)
            for name in options.systems
        }
        self._up: dict[str, System] = {}
        self._failed: set[str] = set()

    async def run(self) -> None:
        try:
            for name in self._options.systems:
                if self.results[name].kept_up and await self._start(name):
                    await asyncio.to_thread(self._up[name].processes.freeze)
            for number in range(self._options.num_rounds):
                for name in self._options.systems:
                    await self._take_turn(name, number)
        finally:
            for name in list(self._up):
                await self._stop(name)

    async def _take_turn(self, name: str, number: int) -> None:
        result = self.results[name]
        if name in self._failed or (not result.kept_up and not await self._start(name)):
            return
        system = self._up[name]
        _say(f"round {number + 1}/{self._options.num_rounds}: {name}")
        try:
            if result.kept_up:
                await asyncio.to_thread(system.processes.thaw)
            figures = await run_round(system, self._options.workload, self._prompts, key=f"round-{number}")
        except Exception as error:  # the outermost place that still knows which system failed
            await self._give_up(name, f"round {number + 1}", error)
            return
        result.rounds[number] = figures
        _say(
            f"  TTFT {figures.ttft_s:.3f} s, one stream {figures.single_tokens_per_s:.1f} tok/s, "
            f"{self._options.workload.streams} streams {figures.streams_tokens_per_s:.1f} tok/s"
        )
        if result.kept_up:
            await asyncio.to_thread(system.processes.freeze)
        else:
            await self._stop(name)

    async def _start(self, name: str) -> bool:
        system = SYSTEMS[name](self._setup)
        result = self.results[name]
        self._up[name] = system
        _say(f"starting {name} (log: {system.log()})")
        try:
            warm_up = await start_and_warm_up(system, self._options.workload, self._prompts)
        except Exception as error:  # as above
            await self._give_up(name, "start-up", error)
            return False
        result.warm_ups.append(warm_up)
        result.versions = system.versions()
        result.commands = [_shown(command) for command in system.commands]
        _say(f"  ready after {warm_up.start_s:.0f} s, {warm_up.peak_serving_bytes / GIB:.2f} GiB at its peak")
        return True

    async def _give_up(self, name: str, when: str, error: Exception) -> None:
        self._failed.add(name)
        self.results[name].errors.append(f"{when}: {_reason(error)}")
        _say(f"  failed at {when}: {_reason(error)}")
        await self._stop(name)

    async def _stop(self, name: str) -> None:
        system = self._up.pop(name)
        try:
            await system.stop()
        except Exception as error:  # stopping one must not keep the others from being stopped
            self.results[name].errors.append(f"stopping: {_reason(error)}")


def _kept_up(systems: Sequence[str]) -> set[str]:
    """Which systems stay up, frozen, between their turns: the slow starters first, as far as memory goes."""
    free_gib = psutil.virtual_memory().available / GIB - RESERVED_GIB
    kept: set[str] = set()
    for name in sorted(systems, key=lambda name: -SYSTEMS[name].estimated_gib):
        others = [SYSTEMS[other].estimated_gib for other in systems if other not in kept | {name}]
        needed_gib = sum(SYSTEMS[one].estimated_gib for one in kept | {name}) + max(others, default=0.0)
        if SYSTEMS[name].can_freeze and needed_gib <= free_gib:
            kept.add(name)
    return kept


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shown(command: Command) -> dict[str, object]:
    """Without the paths of this machine: they say nothing to a reader."""
    home, repo = str(Path.home()), str(REPO)
    words = [word.replace(repo + "/", "").replace(home, "~") for word in command.argv]
    return {"argv": words, "env": dict(command.env)}


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _kv_bytes_per_token(model_dir: Path) -> int:
    """Keys and values of one token in bf16, from config.json."""
    config = json.loads((model_dir / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return int(config["num_hidden_layers"]) * 2 * int(heads) * int(head_dim) * 2


def make_setup(
    model: str, workload: Workload, *, log_dir: Path, kv_gib: int = 1, start_timeout_s: float = 600.0
) -> Setup:
    """What every system is built from; fetches the model where it is not here yet."""
    model_dir = resolve(model)
    return Setup(
        model_dir=model_dir,
        workload=workload,
        log_dir=log_dir,
        cores=tuple(allowed_cores()),
        kv_gib=kv_gib,
        kv_bytes_per_token=_kv_bytes_per_token(model_dir),
        start_timeout_s=start_timeout_s,
        venv_root=REPO,
    )


def run_benchmark(model: str, options: Options, *, out: Path, kv_gib: int, start_timeout_s: float) -> Run:
    """Measure, and write results.json and results.md to `out` (also when systems failed)."""
    environment, began_s = describe_environment(), time.perf_counter()
    setup = make_setup(
        model, options.workload, log_dir=out / "logs", kv_gib=kv_gib, start_timeout_s=start_timeout_s
    )
    benchmark = Benchmark(setup, options)
    try:
        with reaping_orphans():
            asyncio.run(_until_told_to_stop(benchmark))
    finally:
        run = Run(
            model=setup.model_dir.name,
            dtype="bfloat16",
            kv_gib=kv_gib,
            workload=options.workload,
            environment=environment,
            num_rounds=options.num_rounds,
            seed=options.seed,
            wall_s=time.perf_counter() - began_s,
            systems=list(benchmark.results.values()),
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(to_json(run))
        (out / "results.md").write_text(to_markdown(run))
        _say(f"written: {out / 'results.md'} and results.json")
    return run


async def _until_told_to_stop(benchmark: Benchmark) -> None:
    """SIGTERM ends a run as Ctrl-C does: everything that was started is stopped."""
    task = asyncio.ensure_future(benchmark.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="as for `pdserve serve`")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, help="5 by default, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="one short round: does everything still run?")
    parser.add_argument("--restart", action="store_true", help="start every system anew for every round")
    parser.add_argument("--kv-gib", type=int, default=1, help="KV cache per engine, the same for all")
    parser.add_argument("--start-timeout", type=float, default=600.0, metavar="S", help="per system")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--out", type=Path, default=REPO / "out" / "bench", help="folder for the results")
    parsed = parser.parse_args(arguments)
    parsed.systems = tuple(parsed.systems.split(","))
    unknown = [name for name in parsed.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"no such system: {', '.join(unknown)}; known: {', '.join(SYSTEMS)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    options = Options(
        systems=parsed.systems,
        workload=QUICK if parsed.quick else FULL,
        num_rounds=parsed.rounds or (1 if parsed.quick else 5),
        restart_always=parsed.restart,
        seed=parsed.seed,
    )
    try:
        run = run_benchmark(
            parsed.model,
            options,
            out=parsed.out,
            kv_gib=parsed.kv_gib,
            start_timeout_s=parsed.start_timeout,
        )
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    print(to_markdown(run))
    return 1 if any(system.errors for system in run.systems) else 0


if __name__ == "__main__":
    sys.exit(main())
