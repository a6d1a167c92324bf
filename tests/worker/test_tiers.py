"""Real workers with tiers below their pools, and an engine whose tokens tell whether every byte is right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pdserve.core.messages import Cancel, PrefillStarted, Role, StartDecode
from pdserve.core.worker_state import TierCounts
from tests.support.driver import GREEDY, Driver
from tests.support.token_engine import BLOCK_TOKENS, VOCAB, TokenEngine, reference
from tests.support.workers import Pair, config_of, pair_of_workers

POOL_BLOCKS = 12
BLOCK_BYTES = TokenEngine().runner.pools[0].layout.block_bytes
GIB = 1 << 30
HOST = {"host_tier_gib": 40 * BLOCK_BYTES / GIB}

Scenario = Callable[[Pair, Driver], Awaitable[None]]


def disk(path: Path, blocks: int = 60) -> dict[str, object]:
    return {"disk_tier_gib": blocks * BLOCK_BYTES / GIB, "disk_tier_path": str(path)}


def prompt_of(seed: int, length: int = 9 * BLOCK_TOKENS) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def run(folder: Path, scenario: Scenario, model: str = "token-engine", **cache: object) -> None:
    """Play a scenario on fresh workers with small pools, then find every block back."""

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            await scenario(pair, driver)

    def engine(role: Role) -> TokenEngine:
        return TokenEngine(num_blocks=POOL_BLOCKS, model=model)

    with pair_of_workers(folder, engine, config_of(cache=cache)) as pair:
        asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()


def tiers(pair: Pair, role: Role) -> TierCounts:
    return (pair.prefill if role is Role.PREFILL else pair.decode).snapshot().tiers


async def ask(driver: Driver, prompt: list[int], *, colocated: bool = False) -> int:
    """Check the answer; how many tokens of the prompt were not computed."""
    answer = await driver.ask(driver.spec(prompt), colocated=colocated)
    assert answer.failed is None
    assert answer.tokens == reference(prompt, GREEDY, GREEDY.max_tokens)
    (started,) = answer.said(PrefillStarted)
    return started.cached_tokens


async def evict(pair: Pair, driver: Driver, role: Role, *, colocated: bool = False) -> None:
    """Once what is cached is below as well, fill the pool with another prompt."""
    worker = pair.prefill if role is Role.PREFILL else pair.decode
    worker.wait_for(lambda beat: beat.blocks.held == 0 and beat.tiers.bytes_stored > 0)
    await ask(driver, prompt_of(10_000), colocated=colocated)
    worker.wait_for(lambda beat: beat.blocks.held == 0)


@pytest.mark.parametrize("colocated", [False, True], ids=["prefill worker", "decode worker"])
@pytest.mark.parametrize("where", ["host", "disk", "both"])
def test_an_evicted_prompt_comes_back_from_its_tier(tmp_path: Path, where: str, colocated: bool) -> None:
    role = Role.DECODE if colocated else Role.PREFILL
    cache = {"host": HOST, "disk": disk(tmp_path / "t"), "both": {**HOST, **disk(tmp_path / "t")}}[where]

    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(1)
        assert await ask(driver, prompt, colocated=colocated) == 0
        await evict(pair, driver, role, colocated=colocated)
        assert await ask(driver, prompt, colocated=colocated) == len(prompt) - BLOCK_TOKENS
        found = tiers(pair, role)
        assert found.host_hit_tokens + found.disk_hit_tokens > 0
        assert (found.disk_hit_tokens > 0) == (where == "disk")

    run(tmp_path, scenario, **cache)


def test_without_tiers_an_evicted_prompt_is_computed_anew(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        await ask(driver, prompt_of(1))
        await ask(driver, prompt_of(10_000))
        assert await ask(driver, prompt_of(1)) < len(prompt_of(1)) - BLOCK_TOKENS
        assert tiers(pair, Role.PREFILL) == TierCounts()

    run(tmp_path, scenario)


def test_a_restarted_worker_finds_what_it_left_on_disk(tmp_path: Path) -> None:
    async def first(pair: Pair, driver: Driver) -> None:
        await ask(driver, prompt_of(1))
        pair.prefill.wait_for(lambda beat: beat.tiers.disk_bytes >= 9 * BLOCK_BYTES)

    async def again(pair: Pair, driver: Driver) -> None:
        assert await ask(driver, prompt_of(1)) == len(prompt_of(1)) - BLOCK_TOKENS

    run(tmp_path, first, **disk(tmp_path / "t"))
    run(tmp_path, again, **disk(tmp_path / "t"))


def test_a_worker_of_another_model_finds_nothing(tmp_path: Path) -> None:
    async def first(pair: Pair, driver: Driver) -> None:
        await ask(driver, prompt_of(1))
        pair.prefill.wait_for(lambda beat: beat.tiers.disk_bytes >= 9 * BLOCK_BYTES)

    async def again(pair: Pair, driver: Driver) -> None:
        assert await ask(driver, prompt_of(1)) == 0

    run(tmp_path, first, **disk(tmp_path / "t"))
    run(tmp_path, again, model="another", **disk(tmp_path / "t"))


@pytest.mark.parametrize("colocated", [False, True], ids=["prefill worker", "decode worker"])
def test_corrupt_and_torn_blocks_are_computed_anew(tmp_path: Path, colocated: bool) -> None:
    role = Role.DECODE if colocated else Role.PREFILL

    async def scenario(pair: Pair, driver: Driver) -> None:
        await ask(driver, prompt_of(1), colocated=colocated)
        await evict(pair, driver, role, colocated=colocated)
        for index, file in enumerate(sorted((tmp_path / "t").glob(f"{role.value}-0/*.kv"))):
            data = bytearray(file.read_bytes())
            data[-1 - index] ^= 1
            file.write_bytes(data if index % 2 else data[:-1])
        assert await ask(driver, prompt_of(1), colocated=colocated) < BLOCK_TOKENS * 9
        assert tiers(pair, role).corrupt_blocks >= 1

    run(tmp_path, scenario, **disk(tmp_path / "t"))


def test_many_prompts_through_small_tiers_all_get_their_own_tokens(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        rng = random.Random(5)
        shared = prompt_of(2, 5 * BLOCK_TOKENS)
        prompts = [
            shared[: BLOCK_TOKENS * rng.randrange(6)] + prompt_of(100 + i, rng.randrange(1, 14))
            for i in range(12)
        ]
        for _ in range(4):
            rng.shuffle(prompts)
            for start in range(0, len(prompts), 4):
                await asyncio.gather(
                    *(ask(driver, prompt, colocated=rng.random() < 0.5) for prompt in prompts[start:][:4])
                )
        assert tiers(pair, Role.PREFILL).host_hit_tokens + tiers(pair, Role.DECODE).host_hit_tokens > 0

    small = {"host_tier_gib": 15 * BLOCK_BYTES / GIB, **disk(tmp_path / "t", 20)}
    run(tmp_path, scenario, **small)


def test_a_request_that_is_cancelled_while_its_prefix_comes_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(1)
        await ask(driver, prompt, colocated=True)
        await evict(pair, driver, Role.DECODE, colocated=True)
        for _ in range(20):
            spec = driver.spec(prompt)
            worker = driver.the(Role.DECODE)
            driver.send(
                worker,
                StartDecode(spec=spec, prefill_worker=None, lease_s=5.0),
                Cancel(attempt=spec.attempt, reason="the client is gone"),
            )
        pair.decode.wait_for(lambda beat: beat.blocks.held == 0 and beat.waiting == beat.running == 0)
        assert await ask(driver, prompt, colocated=True) > 0

    run(tmp_path, scenario, **HOST)
