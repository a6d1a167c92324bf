"""Runs the workload against one system: a warm-up that also weighs it, then timed rounds."""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Final

from benchmarks.processes import MemorySampler
from benchmarks.system import System
from benchmarks.workload import PromptSource, Workload

REQUEST_TIMEOUT_S: Final = 600.0
IDLE_WATCH_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Figures of one system in one round. Times are the client's, and include its way to the server."""

    ttft_s: float
    """Median of the repeats: a prompt of `ttft_prompt_tokens`, alone."""
    single_tokens_per_s: float
    """One stream alone: tokens after the first over the time they took."""
    streams_tokens_per_s: float
    """All streams at once: all output tokens over the time from the first request to the last token."""
    streams_ttft_s: float
    """Median over the concurrent streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    start_s: float
    """From nothing to ready."""
    peak_start_bytes: int
    """Highest summed PSS of all its processes until ready."""
    peak_serving_bytes: int
    """The same during one untimed pass over the whole workload."""
    idle_cores: float
    """Cores it keeps busy with no request at hand."""


async def start_and_warm_up(system: System, workload: Workload, prompts: PromptSource) -> WarmUp:
    """Start the system, run every phase once untimed and watch its memory; then watch it idle."""
    began_s = time.perf_counter()
    with MemorySampler(system.processes) as starting:
        await system.start()
    start_s = time.perf_counter() - began_s
    with MemorySampler(system.processes) as serving:
        # The very first request compiles and allocates: answered alone, so that no time-out is shared.
        await _single(system, prompts, workload.stream_prompt_tokens, 4, "first")
        await run_round(system, workload, prompts, key="warm-up")
    return WarmUp(
        start_s=start_s,
        peak_start_bytes=starting.peak_bytes,
        peak_serving_bytes=serving.peak_bytes,
        idle_cores=await _idle_cores(system),
    )


async def run_round(system: System, workload: Workload, prompts: PromptSource, *, key: str) -> Round:
    """One timed pass. Every prompt is new; the same `key` gives all systems the same prompts."""
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        await _single(system, prompts, workload.stream_prompt_tokens, 4, key, "wake")
        ttft_s = [
            await _ttft_s(system, workload, prompts, key, repeat) for repeat in range(workload.ttft_repeats)
        ]
        single = await _decode_rate(system, workload, prompts, key)
        streams, streams_ttft_s = await _streams(system, workload, prompts, key)
    return Round(
        ttft_s=statistics.median(ttft_s),
        single_tokens_per_s=single,
        streams_tokens_per_s=streams,
        streams_ttft_s=streams_ttft_s,
    )


async def _single(system: System, prompts: PromptSource, length: int, output: int, *key: str) -> None:
    prompt = prompts.make(length, *key)
    (await system.answer(prompt, output)).check(prompt, output)


async def _ttft_s(system: System, workload: Workload, prompts: PromptSource, key: str, repeat: int) -> float:
    prompt = prompts.make(workload.ttft_prompt_tokens, key, "ttft", repeat)
    answer = await system.answer(prompt, workload.ttft_output_tokens)
    answer.check(prompt, workload.ttft_output_tokens)
    return answer.ttft_s


async def _decode_rate(system: System, workload: Workload, prompts: PromptSource, key: str) -> float:
    prompt = prompts.make(workload.single_prompt_tokens, key, "single")
    answer = await system.answer(prompt, workload.single_output_tokens)
    answer.check(prompt, workload.single_output_tokens)
    return answer.decode_tokens_per_s


async def _streams(
    system: System, workload: Workload, prompts: PromptSource, key: str
) -> tuple[float, float]:
    asked = [
        prompts.make(workload.stream_prompt_tokens, key, "stream", index) for index in range(workload.streams)
    ]
    answers = await system.answer_all(asked, workload.stream_output_tokens)
    for prompt, answer in zip(asked, answers, strict=True):
        answer.check(prompt, workload.stream_output_tokens)
    wall_s = max(answer.last_s for answer in answers) - min(answer.sent_s for answer in answers)
    tokens = sum(answer.output_tokens for answer in answers)
    return tokens / wall_s, statistics.median(answer.ttft_s for answer in answers)


async def _idle_cores(system: System) -> float:
    before = system.processes.cpu_s()
    await asyncio.sleep(IDLE_WATCH_S)
    return (system.processes.cpu_s() - before) / IDLE_WATCH_S
