"""Real workers, a real coordinator, a model whose tokens depend on every byte of KV: drains change none."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from kvtransfer.local import LocalHub
from pdserve.client import AsyncClient
from pdserve.client.admin import drain
from pdserve.core.config import ServeConfig
from pdserve.core.errors import PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.sampling import SamplingParams
from pdserve.elastic.worker import start_worker
from pdserve.engine.batch import SequenceSlice
from pdserve.worker.running import RunningWorker
from pdserve.worker.spec import WorkerSpec
from tests.support.deployment import scenario
from tests.support.scripted_model import make_scripted_model
from tests.support.token_engine import BLOCK_TOKENS, TokenEngine, reference
from tests.support.workers import config_of, local_backends

NUM_TOKENS = 60
STEP_S = {"decode-0": 0.025}
"""The worker that is drained is slow, so that its requests are far from done when the drain reaches it."""


@dataclass
class System:
    coordinator: Coordinator
    client: AsyncClient
    address: str
    workers: dict[str, RunningWorker]
    engines: dict[str, TokenEngine]

    async def drain(self, worker: str) -> None:
        async with asyncio.timeout(20):
            await asyncio.to_thread(lambda: list(drain(self.address, worker, timeout_s=10.0)))

    async def lose(self, worker: str) -> None:
        await asyncio.to_thread(self.workers.pop(worker).stop)
        await self.coordinator.remove_worker(WorkerId(worker), "test")

    def every_block_is_back(self) -> None:
        for worker in self.workers.values():
            worker.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0, 10.0)
            assert worker.snapshot().blocks.conserved


@contextlib.asynccontextmanager
async def system(
    folder: Path, *, decode: int = 2, num_blocks: int = 160, **sections: dict[str, Any]
) -> AsyncIterator[System]:
    decoding = {"workers": decode, "max_num_batched_tokens": 16}
    routing = {"port": 0, "local_prefill": "never"}
    config = config_of(coordinator=routing, decode=decoding, **sections)
    model = ServedModel.from_dir(make_scripted_model(folder / "model"), name="scripted")
    coordinator = Coordinator(config, [model])
    endpoints = await coordinator.start()
    hub = LocalHub()
    workers: dict[str, RunningWorker] = {}
    engines: dict[str, TokenEngine] = {}
    try:
        for role, count in ((Role.PREFILL, 1), (Role.DECODE, decode)):
            for index in range(count):
                name = f"{role.value}-{index}"
                engine = engines[name] = TokenEngine(num_blocks=num_blocks)
                if role is Role.DECODE:
                    engine.runner.before_step = _slow(STEP_S.get(name, 0.001))
                workers[name] = await asyncio.to_thread(_start, name, role, folder, config, engine, hub)
                await coordinator.add_worker(workers[name].address)
        async with AsyncClient(endpoints.grpc, timeout_s=30) as client:
            yield System(coordinator, client, endpoints.grpc, workers, engines)
    finally:
        await coordinator.stop(0.0)
        for worker in workers.values():
            await asyncio.to_thread(worker.stop)


def _slow(seconds: float) -> Callable[[Sequence[SequenceSlice]], None]:
    pause = threading.Event()

    def before_step(slices: Sequence[SequenceSlice]) -> None:
        pause.wait(seconds)

    return before_step


def _start(
    name: str, role: Role, folder: Path, config: ServeConfig, engine: TokenEngine, hub: LocalHub
) -> RunningWorker:
    spec = WorkerSpec(
        worker=WorkerId(name),
        role=role,
        epoch=1,
        config=config,
        model_dir=folder,
        listen=f"unix:{folder}/{name}.sock",
    )
    return start_worker(spec, engine=engine, backend_factory=local_backends(hub))


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 97) for _ in range(length)]


class Streaming:
    """One sample as it is written."""

    def __init__(self, running: System, prompt: list[int], **options: Any) -> None:
        self.prompt, self.options = prompt, options
        self.tokens: dict[int, list[int]] = {}
        self.num_logprobs = 0
        self.timings: Any = None
        self.error: PdServeError | None = None
        self._grown = asyncio.Condition()
        self._task = asyncio.create_task(self._run(running))

    async def _run(self, running: System) -> None:
        try:
            async for delta in running.client.stream(
                prompt_token_ids=self.prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **self.options
            ):
                self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
                self.num_logprobs += len(delta.logprobs)
                self.timings = delta.timings or self.timings
                async with self._grown:
                    self._grown.notify_all()
        except PdServeError as error:
            self.error = error

    async def reaches(self, count: int) -> None:
        async with asyncio.timeout(10), self._grown:
            await self._grown.wait_for(lambda: len(self.tokens.get(0, [])) >= count)

    async def end(self) -> None:
        async with asyncio.timeout(20):
            await self._task

    def cancel(self) -> None:
        self._task.cancel()

    def right(self, **params: Any) -> None:
        assert self.error is None, self.error
        expected = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **params)
        assert self.tokens[0] == reference(self.prompt, expected, NUM_TOKENS)


GREEDY: dict[str, Any] = {"temperature": 0.0, "seed": 5}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5}
PENALISED: dict[str, Any] = {
    **SAMPLED,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}


@scenario
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"])
@pytest.mark.parametrize("length", [1, BLOCK_TOKENS, 41])
async def test_a_drain_changes_no_token_and_reads_nothing_again(
    tmp_path: Path, params: dict[str, Any], length: int
) -> None:
    async with system(tmp_path) as running:
        streams = [Streaming(running, prompt_of(length, seed), logprobs=1, **params) for seed in range(4)]
        for stream in streams:
            await stream.reaches(8)
        await running.drain("decode-0")
        for stream in streams:
            await stream.end()
            stream.right(**params)
            assert stream.num_logprobs == NUM_TOKENS
            assert stream.timings.attempts == 1
            assert stream.timings.decode_worker == "decode-1"
        read = sum(count for step in running.engines["decode-1"].runner.steps for _, count in step)
        rows = sum(len(step) for step in running.engines["decode-1"].runner.steps)
        assert read == rows, "a decode worker computed more than one token of a sequence in a step"
        await asyncio.to_thread(running.every_block_is_back)


@scenario
@pytest.mark.parametrize("params", [GREEDY, PENALISED], ids=["greedy", "penalised"])
async def test_a_drain_changes_no_token_of_workers_that_guess(tmp_path: Path, params: dict[str, Any]) -> None:
    guessing = {"method": "ngram", "adaptive": False, "prompt_lookup_min": 1, "num_speculative_tokens": 6}
    async with system(tmp_path, speculative=guessing) as running:
        streams = [Streaming(running, prompt_of(41, seed), logprobs=1, **params) for seed in range(4)]
        for stream in streams:
            await stream.reaches(8)
        await running.drain("decode-0")
        for stream in streams:
            await stream.end()
            stream.right(**params)
            assert stream.num_logprobs == NUM_TOKENS
        beats = [running.workers[f"decode-{index}"].snapshot() for index in range(2)]
        assert all(sum(beat.proposed_at) > 0 for beat in beats)
        await asyncio.to_thread(running.every_block_is_back)


@scenario
async def test_samples_of_one_prompt_move_alike(tmp_path: Path) -> None:
    async with system(tmp_path) as running:
        moved = Streaming(running, prompt_of(30, 1), n=3, **SAMPLED)
        await moved.reaches(8)
        await running.drain("decode-0")
        await moved.end()
        assert moved.error is None
        calm = Streaming(running, prompt_of(30, 1), n=3, **SAMPLED)
        await calm.end()
        assert moved.tokens == calm.tokens
        assert len({tuple(tokens) for tokens in moved.tokens.values()}) > 1


@scenario
@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
async def test_the_death_of_either_side_in_a_drain_costs_no_token(tmp_path: Path, victim: str) -> None:
    async with system(tmp_path, decode=3) as running:
        streams = [Streaming(running, prompt_of(33, seed), **SAMPLED) for seed in range(6)]
        for stream in streams:
            await stream.reaches(5)
        draining = asyncio.create_task(running.drain("decode-0"))
        await streams[0].reaches(7)
        await running.lose(victim)
        for stream in streams:
            await stream.end()
            stream.right(**SAMPLED)
        with contextlib.suppress(PdServeError):  # the drain of a worker that died
            await draining
        await asyncio.to_thread(running.every_block_is_back)


@scenario
async def test_cancels_in_the_middle_of_a_drain_return_every_block(tmp_path: Path) -> None:
    async with system(tmp_path) as running:
        streams = [Streaming(running, prompt_of(33, seed), **SAMPLED) for seed in range(6)]
        for stream in streams:
            await stream.reaches(5)
        draining = asyncio.create_task(running.drain("decode-0"))
        for stream in streams[::2]:
            stream.cancel()
            await asyncio.sleep(0)
        for stream in streams[1::2]:
            await stream.end()
            stream.right(**SAMPLED)
        await draining
        await asyncio.to_thread(running.every_block_is_back)


@scenario
async def test_without_room_elsewhere_requests_finish_where_they_are(tmp_path: Path) -> None:
    async with system(tmp_path, decode=1) as running:
        stream = Streaming(running, prompt_of(20, 3), **GREEDY)
        await stream.reaches(5)
        await running.drain("decode-0")
        await stream.end()
        stream.right(**GREEDY)
        assert stream.timings.decode_worker == "decode-0"


@scenario
async def test_after_a_decode_worker_died_the_prompt_is_sent_again_and_not_read_again(tmp_path: Path) -> None:
    async with system(tmp_path) as running:
        stream = Streaming(running, prompt_of(41, 7), **SAMPLED)
        await stream.reaches(5)
        placed = [w.id for w in running.coordinator.snapshot().workers if w.role is Role.DECODE and w.placed]
        steps = running.engines["prefill-0"].runner.steps
        read_before = len(steps)
        await running.lose(str(placed[0]))
        await stream.end()
        stream.right(**SAMPLED)
        assert stream.timings.attempts == 2
        (again,) = steps[read_before:]
        ((start, count),) = again
        assert start == 41 // BLOCK_TOKENS * BLOCK_TOKENS
        assert start + count < 41 + NUM_TOKENS
