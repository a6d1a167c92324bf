"""Two workers and a coordinator's channel in one process; an engine whose tokens depend on every KV byte."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pdserve.core.ids import AttemptId
from pdserve.core.messages import (
    FinishReason,
    KvArrived,
    PrefillDone,
    PrefillStarted,
    PushesSettled,
    Reserved,
    Role,
    Tokens,
    TransferDone,
)
from pdserve.core.sampling import SamplingParams
from tests.support.driver import GREEDY, Driver
from tests.support.token_engine import BLOCK_TOKENS, VOCAB, TokenEngine, reference
from tests.support.workers import Pair, config_of, pair_of_workers

SAMPLED = SamplingParams(temperature=1.0, seed=1234, max_tokens=12)
CHUNK = 16

Scenario = Callable[[Pair, Driver], Awaitable[None]]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length}/{seed}").choices(range(VOCAB), k=length)


def run(
    folder: Path, scenario: Scenario, *, decode_blocks: int = 64, prefill_blocks: int = 64, **config: object
) -> None:
    """Play a scenario on fresh workers, then find every block back."""

    async def play(pair: Pair) -> None:
        async with Driver(pair.addresses) as driver:
            await scenario(pair, driver)

    def engine(role: Role) -> TokenEngine:
        return TokenEngine(num_blocks=decode_blocks if role is Role.DECODE else prefill_blocks)

    with pair_of_workers(folder, engine, config_of(**config)) as pair:  # type: ignore[arg-type]
        asyncio.run(play(pair))
        pair.wait_until_every_block_is_back()


@pytest.mark.parametrize(
    "length",
    [
        1,
        BLOCK_TOKENS - 1,
        BLOCK_TOKENS,
        BLOCK_TOKENS + 1,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        5 * CHUNK,
        5 * CHUNK + 3,
    ],
)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_decode_worker_goes_on_exactly_where_the_prefill_worker_stopped(
    tmp_path: Path, length: int, params: SamplingParams
) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(length)
        expected = reference(prompt, params, params.max_tokens)
        answer = await driver.ask(driver.spec(prompt, params))
        assert answer.failed is None
        assert answer.tokens == expected
        assert answer.finish is FinishReason.LENGTH
        assert await driver.generate(prompt, params, colocated=True) == expected

    run(tmp_path, scenario)


def test_a_disaggregated_request_is_told_in_order_with_one_last_word_of_its_pushes(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        answer = await driver.ask(driver.spec(prompt_of(3 * CHUNK)))
        by_prefill = [type(m) for w, m in answer.messages if w == driver.the(Role.PREFILL)]
        assert by_prefill[0] is PrefillStarted
        assert by_prefill[-2:] == [PrefillDone, TransferDone]
        by_decode = [type(m) for w, m in answer.messages if w == driver.the(Role.DECODE)]
        assert by_decode == [Reserved, KvArrived, *[Tokens] * 8]
        (done,) = answer.said(TransferDone)
        layout = driver.infos[driver.the(Role.DECODE)].fingerprint.layouts[0]
        assert done.bytes_moved == 3 * CHUNK // BLOCK_TOKENS * layout.block_bytes
        assert done.path == "local"
        assert done.busy_s > 0

    run(tmp_path, scenario)


def test_the_answer_that_ends_with_its_first_token_never_reaches_the_decode_worker(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(2 * CHUNK + 1)
        first = reference(prompt, GREEDY, 1)
        for spec in (
            driver.spec(prompt, GREEDY, eos_token_ids=(first[0],)),
            driver.spec(prompt, dataclasses.replace(GREEDY, stop_token_ids=(first[0],))),
            driver.spec(prompt, dataclasses.replace(GREEDY, max_tokens=1)),
        ):
            answer = await driver.ask(spec)
            assert answer.tokens == first
            assert answer.said(KvArrived) == []
            assert len(answer.said(PushesSettled)) == 1
            assert answer.finish is answer.said(PrefillDone)[0].finish_reason is not None

    run(tmp_path, scenario)


@pytest.mark.parametrize("colocated", [False, True], ids=["disaggregated", "colocated"])
def test_an_answer_ends_at_eos_and_not_before_min_tokens(tmp_path: Path, colocated: bool) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(9)
        expected = reference(prompt, GREEDY, 8)
        eos = (expected[4],)
        answer = await driver.ask(driver.spec(prompt, GREEDY, eos_token_ids=eos), colocated=colocated)
        assert answer.tokens == expected[: expected.index(eos[0]) + 1]
        assert answer.finish is FinishReason.STOP
        ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
        spec = driver.spec(prompt, ignoring, eos_token_ids=eos)
        assert (await driver.ask(spec, colocated=colocated)).tokens == expected
        patient = dataclasses.replace(GREEDY, min_tokens=8)
        spec = driver.spec(prompt, patient, eos_token_ids=eos)
        answer = await driver.ask(spec, colocated=colocated)
        assert len(answer.tokens) == 8
        assert eos[0] not in answer.tokens

    run(tmp_path, scenario)


def test_a_shared_prefix_is_neither_computed_nor_moved_twice(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        shared = prompt_of(2 * CHUNK)
        first, second = shared + prompt_of(5, 1), shared + prompt_of(7, 2)
        one = await driver.ask(driver.spec(first))
        two = await driver.ask(driver.spec(second))
        assert one.tokens == reference(first, GREEDY, 8)
        assert two.tokens == reference(second, GREEDY, 8)
        assert two.said(PrefillStarted)[0].cached_tokens == len(shared)
        assert two.said(Reserved)[0].cached_tokens == len(shared)
        layout = driver.infos[driver.the(Role.DECODE)].fingerprint.layouts[0]
        assert two.said(TransferDone)[0].bytes_moved == 2 * layout.block_bytes
        other_tenant = driver.spec(second, cache_salt=b"another tenant")
        three = await driver.ask(other_tenant)
        assert three.tokens == two.tokens
        assert three.said(Reserved)[0].cached_tokens == three.said(PrefillStarted)[0].cached_tokens == 0

    run(tmp_path, scenario)


def test_a_prefix_that_only_the_prefill_worker_knows_is_moved_from_its_cache(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(3 * CHUNK)
        await driver.ask(driver.spec(prompt, dataclasses.replace(GREEDY, max_tokens=1)))
        answer = await driver.ask(driver.spec(prompt))
        assert answer.said(PrefillStarted)[0].cached_tokens == 3 * CHUNK - BLOCK_TOKENS
        assert answer.said(Reserved)[0].cached_tokens == 0
        assert answer.tokens == reference(prompt, GREEDY, 8)

    run(tmp_path, scenario)


def test_a_prefix_that_only_the_decode_worker_knows_is_computed_again_but_not_moved(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(3 * CHUNK)
        await driver.generate(prompt, colocated=True)
        answer = await driver.ask(driver.spec(prompt))
        assert answer.said(PrefillStarted)[0].cached_tokens == 0
        assert answer.said(Reserved)[0].cached_tokens == 3 * CHUNK - BLOCK_TOKENS
        layout = driver.infos[driver.the(Role.DECODE)].fingerprint.layouts[0]
        assert answer.said(TransferDone)[0].bytes_moved == layout.block_bytes
        assert answer.tokens == reference(prompt, GREEDY, 8)

    run(tmp_path, scenario)


def test_an_answer_that_was_cached_in_decoding_is_a_prefix_of_the_next_turn(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(CHUNK)
        answer = await driver.generate(prompt)
        turn = [*prompt, *answer, *prompt_of(3, 5)]
        reply = await driver.ask(driver.spec(turn))
        assert reply.said(Reserved)[0].cached_tokens == CHUNK + BLOCK_TOKENS
        assert reply.tokens == reference(turn, GREEDY, 8)

    run(tmp_path, scenario)


def test_forty_requests_at_once_do_not_mix_up(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        specs = []
        for index in range(40):
            forced = index % VOCAB
            bias = {forced: 100.0} if index % 2 else {forced: 100.0, (forced + 1) % VOCAB: -100.0}
            params = dataclasses.replace(GREEDY, max_tokens=1, logit_bias=bias)
            specs.append(driver.spec([index], params))
        answers = await asyncio.gather(*[driver.ask(spec) for spec in specs])
        assert [answer.tokens for answer in answers] == [[index] for index in range(40)]

    run(tmp_path, scenario)


def test_many_requests_share_the_steps_and_each_gets_its_own_tokens(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompts = [prompt_of(1 + 3 * index, index) for index in range(16)]
        asked = [
            driver.generate(prompt, SAMPLED, colocated=index % 3 == 0) for index, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*asked)
        assert answers == [reference(prompt, SAMPLED, 12) for prompt in prompts]

    run(tmp_path, scenario, decode_blocks=200)


def test_a_retry_goes_on_with_the_tokens_it_would_have_had(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(11)
        expected = reference(prompt, SAMPLED, 12)
        for streamed in (1, 5, 11):
            spec = driver.spec(prompt + expected[:streamed], SAMPLED, num_prompt_tokens=len(prompt))
            spec = dataclasses.replace(spec, attempt=spec.attempt.next())
            for colocated in (False, True):
                again = dataclasses.replace(spec, attempt=AttemptId(spec.attempt.request, 2 + colocated))
                answer = await driver.ask(again, colocated=colocated)
                assert answer.tokens == expected[streamed:]
                assert answer.finish is FinishReason.LENGTH

    run(tmp_path, scenario)


def test_prompt_logprobs_are_the_same_from_both_kinds_of_worker(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        prompt = prompt_of(2 * CHUNK + 3)
        params = dataclasses.replace(GREEDY, prompt_logprobs=2, logprobs=1)
        await driver.generate(prompt)  # cached prefixes must not swallow positions
        apart = await driver.ask(driver.spec(prompt, params))
        together = await driver.ask(driver.spec(prompt, params), colocated=True)
        (done,), (done_here,) = apart.said(PrefillDone), together.said(PrefillDone)
        assert done.prompt_logprobs[0] is None
        assert [entry.token for entry in done.prompt_logprobs[1:] if entry] == prompt[1:]
        assert all(len(entry.top) == 2 for entry in done.prompt_logprobs[1:] if entry)
        assert done.prompt_logprobs == done_here.prompt_logprobs
        assert done.logprobs is not None
        assert apart.tokens == together.tokens == reference(prompt, GREEDY, 8)
        for answer in (apart, together):
            assert [entry.token for m in answer.said(Tokens) for entry in m.logprobs] == answer.tokens

    run(tmp_path, scenario)


def test_a_full_pool_preempts_and_the_tokens_stay_the_same(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        params = dataclasses.replace(SAMPLED, max_tokens=30)
        prompts = [prompt_of(6 + index, index) for index in range(6)]
        asked = [
            driver.generate(prompt, params, colocated=index % 2 == 0) for index, prompt in enumerate(prompts)
        ]
        assert await asyncio.gather(*asked) == [reference(prompt, params, 30) for prompt in prompts]
        # Each grows to ten blocks, the pool has fourteen.
        assert pair.decode.snapshot().preemptions > 0

    run(tmp_path, scenario, decode_blocks=14)


def test_an_answer_ends_where_the_context_does(tmp_path: Path) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        long = dataclasses.replace(GREEDY, max_tokens=1000)
        for colocated in (False, True):
            answer = await driver.ask(driver.spec(prompt_of(30), long), colocated=colocated)
            assert len(answer.tokens) == 10 * BLOCK_TOKENS - 30
            assert answer.finish is FinishReason.LENGTH

    run(tmp_path, scenario, decode_blocks=10)


@pytest.mark.parametrize("seed", range(3))
def test_aborts_at_random_moments_give_every_block_back_and_disturb_nobody(tmp_path: Path, seed: int) -> None:
    async def scenario(pair: Pair, driver: Driver) -> None:
        rng = random.Random(seed)
        params = dataclasses.replace(SAMPLED, max_tokens=20)

        async def asked_and_aborted(index: int) -> None:
            spec = driver.spec(prompt_of(rng.randint(1, 70), index), params)
            task = asyncio.create_task(driver.ask(spec, colocated=rng.random() < 0.3))
            delay = rng.random() * 0.2
            await asyncio.wait([task], timeout=delay)
            driver.abort(spec)
            answer = await task
            assert answer.failed is None
            assert answer.tokens == reference(spec.tokens, params, len(answer.tokens))

        steady = [driver.generate(prompt_of(20, 1000 + i), params) for i in range(4)]
        results = await asyncio.gather(*steady, *[asked_and_aborted(i) for i in range(60)])
        assert results[:4] == [reference(prompt_of(20, 1000 + i), params, 20) for i in range(4)]

    run(tmp_path, scenario, decode_blocks=60, prefill_blocks=40)
