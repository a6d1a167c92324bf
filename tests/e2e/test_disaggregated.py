"""A prompt over gRPC, read by one process, written by another, its KV moved by NIXL between them."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.client import AsyncClient
from pdserve.core.errors import InvalidRequest, ModelNotFound, Overloaded, PdServeError, PromptTooLong
from pdserve.core.messages import FinishReason
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("conserved")]

Oracle = tuple[Path, PreTrainedModel]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length}/{seed}").choices(range(1, 300), k=length)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65, 200, 1000])
def test_greedy_tokens_equal_transformers(tiny: RunningDeployment, tiny_oracle: Oracle, length: int) -> None:
    prompt = prompt_of(length)
    with tiny.client() as client:
        completion = client.generate(prompt_token_ids=prompt, max_tokens=24, temperature=0.0)
    assert list(completion.token_ids) == greedy(tiny_oracle[1], prompt, 24)
    timings = completion.timings
    assert (timings.prefill_worker, timings.decode_worker) == ("prefill-0", "decode-0")
    assert timings.bytes_moved > 0
    assert timings.transfer_path in ("shm", "tcp")
    assert timings.attempts == 1


def test_a_shared_prefix_is_neither_computed_nor_sent_again(
    tiny: RunningDeployment, tiny_oracle: Oracle
) -> None:
    shared = prompt_of(320, seed=9)
    with tiny.client() as client:
        first = client.generate(prompt_token_ids=[*shared, 7, 8], max_tokens=8, temperature=0.0)
        second = client.generate(prompt_token_ids=[*shared, 9, 10], max_tokens=8, temperature=0.0)
    assert list(second.token_ids) == greedy(tiny_oracle[1], [*shared, 9, 10], 8)
    assert second.usage.cached_prompt_tokens >= 304
    assert second.timings.bytes_moved < first.timings.bytes_moved / 4


def test_forty_requests_at_once_each_get_their_own_answer(tiny: RunningDeployment) -> None:
    """Opposing biases: a row that got its neighbour's sampling would write its neighbour's token."""

    async def ask() -> list[int]:
        async with AsyncClient(tiny.deployment.grpc, timeout_s=120) as client:
            answers = await asyncio.gather(
                *(
                    client.generate(
                        prompt_token_ids=prompt_of(5, seed=i),
                        max_tokens=1,
                        logit_bias={10 + i: 100.0, 200 - i: -100.0},
                    )
                    for i in range(40)
                )
            )
        return [answer.token_ids[0] for answer in answers]

    assert asyncio.run(ask()) == [10 + i for i in range(40)]


def test_the_same_seed_draws_the_same_tokens_again(tiny: RunningDeployment) -> None:
    with tiny.client() as client:
        runs = [
            client.generate(
                prompt_token_ids=prompt_of(33), max_tokens=16, temperature=1.0, seed=seed
            ).token_ids
            for seed in (1, 1, 2)
        ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_two_hundred_aborts_at_random_moments_leave_no_block_behind(tiny: RunningDeployment) -> None:
    rng = random.Random(3)

    async def abort_one(client: AsyncClient, number: int, gate: asyncio.Semaphore) -> int:
        async with gate:
            prompt, reads = prompt_of(rng.choice([3, 40, 300]), seed=number), rng.randrange(12)
            stream = client.stream(prompt_token_ids=prompt, max_tokens=400, ignore_eos=True)
            seen = 0
            async with aclosing(stream):  # type: ignore[type-var]  # an async generator
                if reads == 0:
                    task = asyncio.ensure_future(anext(stream))
                    await asyncio.sleep(rng.random() * 0.02)  # the moment is what is random here
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    return 0
                async for _ in stream:
                    seen += 1
                    if seen == reads:
                        break
            return seen

    async def main() -> list[int]:
        gate = asyncio.Semaphore(24)
        async with AsyncClient(tiny.deployment.grpc, timeout_s=120) as client:
            return await asyncio.gather(*(abort_one(client, i, gate) for i in range(200)))

    assert sum(asyncio.run(main())) > 200
    tiny.wait_until("every block back", tiny.idle)


def test_bad_input_is_refused_by_name_while_others_keep_streaming(tiny: RunningDeployment) -> None:
    prompt = prompt_of(20)
    with tiny.client() as client:
        running = client.stream(prompt_token_ids=prompt, max_tokens=300, ignore_eos=True, temperature=0.0)
        streamed = list(next(running).token_ids)
        with pytest.raises(ModelNotFound, match="no-such"):
            client.generate("x", model="no-such")
        with pytest.raises(InvalidRequest, match="temperature"):
            client.generate("x", temperature=-1)
        with pytest.raises(InvalidRequest, match="max_tokens"):
            client.generate("x", max_tokens=0)
        with pytest.raises(InvalidRequest, match="prompt"):
            client.generate("")
        with pytest.raises((PromptTooLong, InvalidRequest), match="tokens"):
            client.generate(prompt_token_ids=[5] * 4000)
        with pytest.raises(InvalidRequest, match="prompt"):
            client.generate(prompt_token_ids=[5, 10_000])
        with pytest.raises(PdServeError) as too_big:
            client.generate("x" * 20_000_000)
        assert isinstance(too_big.value, Overloaded | InvalidRequest)
        for delta in running:
            streamed += delta.token_ids
            last = delta
    assert len(streamed) == 300
    assert last.finish_reason is FinishReason.LENGTH


def test_text_goes_in_and_comes_out(tiny: RunningDeployment) -> None:
    with tiny.client() as client:
        completion = client.generate("the quick brown fox", max_tokens=5, temperature=0.0)
        streamed = "".join(
            d.text for d in client.stream("the quick brown fox", max_tokens=5, temperature=0.0)
        )
        models = client.list_models()
    assert completion.text == streamed
    assert [(model.name, model.ready) for model in models] == [("tiny", True)]
