"""Many requests through a real coordinator and real workers, over transfers that go wrong: right or typed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from decode import reception
from kvtransfer.fake import FakeBackend, Faults
from pdserve.client import AsyncClient, Completion
from pdserve.core.errors import PdServeError
from pdserve.core.messages import Role
from pdserve.core.sampling import SamplingParams
from pdserve.elastic.worker import start_worker
from pdserve.worker.running import RunningWorker
from tests.support.deployment import scenario
from tests.support.scripted_model import make_scripted_model
from tests.support.token_engine import BLOCK_TOKENS, TokenEngine, reference
from tests.support.workers import config_of, spec_of
from tests.worker.test_faults import faulty
from tests.worker.test_migration import prompt_of

NUM_TOKENS = 6
TYPED = {"UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"}


@contextlib.asynccontextmanager
async def system(
    folder: Path, faults: Faults, made: list[FakeBackend] | None = None, **sections: dict[str, Any]
) -> AsyncIterator[tuple[AsyncClient, list[RunningWorker]]]:
    """One prefill and one decode worker; every prompt's KV is moved. made: gets the transfer backends."""
    routing = {"port": 0, "local_prefill": "never", "max_attempts": 8}
    config = config_of(coordinator=routing, **sections)
    coordinator = Coordinator(
        config, [ServedModel.from_dir(make_scripted_model(folder / "model"), name="scripted")]
    )
    endpoints = await coordinator.start()
    backends, workers = faulty(faults, made), list[RunningWorker]()
    try:
        for role in Role:
            spec = spec_of(role, folder, config)
            engine = TokenEngine(num_blocks=160)
            worker = await asyncio.to_thread(start_worker, spec, engine=engine, backend_factory=backends)
            workers.append(worker)
            await coordinator.add_worker(worker.address)
        async with AsyncClient(endpoints.grpc, timeout_s=25) as client:
            yield client, workers
    finally:
        await coordinator.stop(0.0)
        for worker in workers:
            await asyncio.to_thread(worker.stop)


async def right_or_typed(client: AsyncClient, number: int) -> int:
    """How many attempts the right answer took; 0: it ended with an error that says what was wrong."""
    prompt = prompt_of(1 + number % 40, number)
    params = SamplingParams(temperature=0.9, seed=number, max_tokens=NUM_TOKENS, ignore_eos=True)
    try:
        completion = await client.generate(
            prompt_token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0.9, seed=number, ignore_eos=True
        )
    except PdServeError as error:
        if error.code not in TYPED:
            raise
        return 0
    assert list(completion.token_ids) == reference(prompt, params, NUM_TOKENS)
    return completion.timings.attempts


def every_block_is_back(workers: list[RunningWorker]) -> None:
    for worker in workers:
        worker.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0, 15.0)
        assert worker.snapshot().blocks.conserved


@scenario
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(
            Faults(seed=2, failure=0.05, delay_s=(0.0, 0.01), duplicate=0.2, reorder=True), id="messy"
        ),
        pytest.param(Faults(seed=3, flip=0.1), id="bytes flip"),
    ],
)
async def test_transfers_that_go_wrong_cost_retries_and_no_token(tmp_path: Path, faults: Faults) -> None:
    verify = {"transfer": {"layer_groups": 2, "verify": "on"}}
    async with system(tmp_path, faults, **verify) as (client, workers):
        attempts = await asyncio.gather(*(right_or_typed(client, number) for number in range(60)))
        assert sum(count > 0 for count in attempts) > 50
        assert max(attempts) > 1, "nothing went wrong"
        await asyncio.to_thread(every_block_is_back, workers)


@scenario
async def test_when_every_sixteenth_push_fails_the_tokens_are_right(tmp_path: Path) -> None:
    made: list[FakeBackend] = []
    sixteenth = Faults(seed=1, fail_every=16)
    async with system(tmp_path, sixteenth, made, transfer={"layer_groups": 2}) as (client, workers):
        attempts = await asyncio.gather(*(right_or_typed(client, number) for number in range(60)))
        assert all(attempts)
        assert max(attempts) > 1
        await asyncio.to_thread(every_block_is_back, workers)
    assert [backend.num_failed for backend in made] == [backend.num_delivered // 16 for backend in made]
    assert sum(backend.num_failed for backend in made) > 0


@scenario
async def test_leases_far_shorter_than_transfers_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired: list[Exception] = []

    class Noted(reception.LeaseExpired):
        def __init__(self, message: str) -> None:
            super().__init__(message)
            expired.append(self)

    monkeypatch.setattr(reception, "LeaseExpired", Noted)
    slow = Faults(seed=4, delay_s=(2.0, 2.0))
    short = {"transfer": {"layer_groups": 2, "lease_s": 0.05}}
    async with system(tmp_path, slow, **short) as (client, workers):
        await asyncio.gather(*(right_or_typed(client, number) for number in range(4)))
        await asyncio.to_thread(every_block_is_back, workers)
    assert len(expired) >= 4, "a lease was long enough"


@scenario
@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
async def test_after_a_storm_of_aborts_the_next_request_works(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(5)

    async def abort(client: AsyncClient, number: int) -> None:
        task = asyncio.create_task(right_or_typed(client, number))
        await asyncio.sleep(rng.random() * 0.03)  # the moment is what is random here
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async with system(tmp_path, Faults(seed=5, delay_s=(0.0, 0.005))) as (client, workers):
        for start in range(0, 4 * rounds, 4):
            await asyncio.gather(*(abort(client, start + index) for index in range(4)))
        assert await right_or_typed(client, 1000)
        await asyncio.to_thread(every_block_is_back, workers)


@scenario
async def test_prompts_of_every_shape_are_right_while_pushes_fail(tmp_path: Path) -> None:
    """Shorter than a block, whole blocks; of which decode has nothing, a part, or all it can use."""
    lengths = (1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS, 3 * BLOCK_TOKENS)
    asked = (*lengths, *lengths)
    whole = prompt_of(lengths[-1], 1)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    answers: list[Completion] = []
    async with system(tmp_path, Faults(seed=6, fail_every=5)) as (client, workers):
        for length in asked:
            answer = await client.generate(
                prompt_token_ids=whole[:length], max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
            )
            assert list(answer.token_ids) == reference(whole[:length], params, NUM_TOKENS)
            answers.append(answer)
        await asyncio.to_thread(every_block_is_back, workers)
    usable = [(length - 1) // BLOCK_TOKENS * BLOCK_TOKENS for length in asked]
    assert [answer.usage.cached_prompt_tokens for answer in answers] == usable
    assert all(answer.timings.bytes_moved for answer in answers if answer.timings.attempts == 1)
    assert max(answer.timings.attempts for answer in answers) > 1
