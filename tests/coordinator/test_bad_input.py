"""Bad input: a status, and a message that names field, value and limit. Others keep streaming."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdserve.client import AsyncClient
from pdserve.core.errors import InvalidRequest, ModelNotFound, PromptTooLong
from pdserve.core.messages import StartDecode
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from tests.support.deployment import Deployed, deployed, scenario
from tests.support.model_workers import continuation

NAN = float("nan")
PROMPT = "hello"

BAD: list[tuple[str, dict[str, Any], str, str, str]] = [
    # name, changed arguments, field, part of the value shown, part of the limit
    ("an empty prompt", {"prompt": ""}, "prompt", "''", "at least one character"),
    ("no token ids", {"prompt": None, "prompt_token_ids": []}, "prompt", "0 tokens", "at least one token"),
    ("no messages", {"prompt": None, "messages": []}, "messages", "[]", "at least one message"),
    ("a prompt beyond the context", {"prompt": "x" * 512}, "prompt", "512 tokens", "at most 511 tokens"),
    ("temperature -1", {"temperature": -1.0}, "temperature", "-1.0", "in [0, 100]"),
    ("temperature NaN", {"temperature": NAN}, "temperature", "nan", "in [0, 100]"),
    ("top_p 0", {"top_p": 0.0}, "top_p", "0.0", "in (0, 1]"),
    ("top_p NaN", {"top_p": NAN}, "top_p", "nan", "in (0, 1]"),
    ("top_k -1", {"top_k": -1}, "top_k", "-1", "in [0, 256]"),
    ("min_p 2", {"min_p": 2.0}, "min_p", "2.0", "in [0, 1]"),
    ("repetition_penalty 0", {"repetition_penalty": 0.0}, "repetition_penalty", "0.0", "in (0, 100]"),
    ("presence_penalty infinite", {"presence_penalty": float("inf")}, "presence_penalty", "inf", "[-2, 2]"),
    ("frequency_penalty 3", {"frequency_penalty": 3.0}, "frequency_penalty", "3.0", "[-2, 2]"),
    ("a negative seed", {"seed": -5}, "seed", "-5", "[0, 2^63)"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "0", "at least 1"),
    ("max_tokens negative", {"max_tokens": -4}, "max_tokens", "-4", "at least 1"),
    ("min above max", {"max_tokens": 2, "min_tokens": 3}, "min_tokens", "3", "max_tokens=2"),
    ("n 0", {"n": 0}, "n", "0", "[1, 16]"),
    ("n 1000", {"n": 1000}, "n", "1000", "[1, 16]"),
    ("logprobs 10000", {"logprobs": 10_000}, "logprobs", "10000", "[0, 20]"),
    ("prompt_logprobs -1", {"prompt_logprobs": -1}, "prompt_logprobs", "-1", "[0, 20]"),
    ("10,000 stop strings", {"stop": ["stop"] * 10_000}, "stop", "10000 entries", "at most 16"),
    (
        "a bias for everything",
        {"logit_bias": dict.fromkeys(range(5000), 0.0)},
        "logit_bias",
        "5000 entries",
        "at most 1024",
    ),
    (
        "a million token ids",
        {"prompt": None, "prompt_token_ids": [1] * 1_000_000},
        "prompt",
        "1000000 tokens",
        "at most 511 tokens",
    ),
    ("an empty stop string", {"stop": [""]}, "stop", "''", "1 to 256 characters"),
    ("a long stop string", {"stop": ["x" * 10_000]}, "stop", "'xxx", "1 to 256 characters"),
    ("a stop id outside", {"stop_token_ids": [256]}, "stop_token_ids", "256", "[0, 256)"),
    ("a negative stop id", {"stop_token_ids": [-1]}, "stop_token_ids", "-1", "[0, 256)"),
    ("a bias outside", {"logit_bias": {999: 1.0}}, "logit_bias", "999", "[0, 256)"),
    ("a bias of NaN", {"logit_bias": {7: NAN}}, "logit_bias[7]", "nan", "[-100, 100]"),
    ("a bias too strong", {"logit_bias": {7: 1e30}}, "logit_bias[7]", "1e+30", "[-100, 100]"),
    ("a ttft target of 0", {"ttft_target_ms": 0.0}, "ttft_target_ms", "0.0", "milliseconds"),
    ("a tpot target of NaN", {"tpot_target_ms": NAN}, "tpot_target_ms", "nan", "milliseconds"),
    ("a deadline in the past", {"deadline_s": -1.0}, "deadline_ms", "-1000.0", "milliseconds"),
    ("a request id with a line break", {"request_id": "a\nb"}, "request_id", "'a\\nb'", "printable ASCII"),
    ("a long request id", {"request_id": "a" * 1000}, "request_id", "'aaaa", "at most 128"),
    ("a tenant with a null byte", {"tenant": "a\x00"}, "tenant", "'a\\x00'", "printable"),
    (
        "a token id outside the vocabulary",
        {"prompt": None, "prompt_token_ids": [1, 2, 256]},
        "prompt_token_ids[2]",
        "256",
        "[0, 256)",
    ),
    (
        "a negative token id",
        {"prompt": None, "prompt_token_ids": [1, -2]},
        "prompt_token_ids[1]",
        "-2",
        "[0, 256)",
    ),
    (
        "a token id of 40 bits",
        {"prompt": None, "prompt_token_ids": [2**40 + 1]},
        "prompt_token_ids[0]",
        str(2**40 + 1),
        "[0, 256)",
    ),
    (
        "a message without a role",
        {"prompt": None, "messages": [{"role": "", "content": "x"}]},
        "messages[0].role",
        "''",
        "a role",
    ),
]


@asynccontextmanager
async def beside_a_running_stream(system: Deployed) -> AsyncIterator[None]:
    """Another client's stream, which must come through whole."""
    decode = system.worker("decode-0")
    decode.allow(2)
    other = asyncio.create_task(system.client.generate("other", max_tokens=50))
    await decode.until(StartDecode)
    yield
    decode.allow(None)
    assert (await other).text == "".join(map(chr, continuation([ord(c) for c in "other"], 50)))


@scenario
async def test_every_bad_field_is_named_with_its_value_and_its_limit(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system, beside_a_running_stream(system):
        for name, changes, field, value, limit in BAD:
            for call in (_unary, _streamed):
                with pytest.raises(InvalidRequest) as caught:
                    await call(system.client, {"prompt": PROMPT, **changes})
                error = caught.value
                assert error.field == field, name
                assert value in str(error.value), f"{name}: {error.value}"
                assert limit in error.limit, f"{name}: {error.limit}"
                assert field in str(error), name
                assert len(str(error)) < 600, name
        assert len(system.cluster.heard(StartDecode)) == 1  # none of them reached a worker


async def _unary(client: AsyncClient, arguments: dict[str, Any]) -> None:
    await client.generate(**arguments)


async def _streamed(client: AsyncClient, arguments: dict[str, Any]) -> None:
    async for _ in client.stream(**arguments):
        raise AssertionError("a delta for bad input")


@scenario
async def test_each_kind_of_bad_input_has_its_own_status(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system, beside_a_running_stream(system):
        with pytest.raises(PromptTooLong):
            await system.client.generate("x" * 5000)
        with pytest.raises(ModelNotFound, match="'gpt-9' is not here; known: scripted"):
            await system.client.generate(PROMPT, model="gpt-9")


@scenario
async def test_a_message_of_100_mb_is_refused_with_its_size_and_the_limit(tmp_path: Path) -> None:
    async with deployed(tmp_path, max_message_mib=1) as system, beside_a_running_stream(system):
        with pytest.raises(InvalidRequest, match=r"1048576") as caught:
            await system.client.generate("x" * 100_000_000)
        assert caught.value.field == "message"
        assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)
        assert caught.value.__cause__.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@scenario
async def test_a_long_prompt_is_tokenised_beside_the_event_loop(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system, beside_a_running_stream(system):
        with pytest.raises(PromptTooLong):
            await system.client.generate("word " * 200_000)


def _raw(path: str, data: bytes) -> Callable[[grpc.aio.Channel], Coroutine[Any, Any, bytes]]:
    async def call(channel: grpc.aio.Channel) -> bytes:
        return await channel.unary_unary(path)(data)  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text that is not UTF-8", b"\x1a\x04\xff\xfe\xfd\xfc"),
        ("a truncated message", b"\x1a\xff"),
        ("random bytes", bytes(range(200, 256))),
    ],
)
@scenario
async def test_bytes_that_are_no_request_are_an_invalid_argument(
    tmp_path: Path, name: str, data: bytes
) -> None:
    async with deployed(tmp_path) as system, grpc.aio.insecure_channel(system.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _raw("/pdserve.v1.Generation/Generate", data)(channel)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, name
        assert "message" in (caught.value.details() or "")


@scenario
async def test_a_request_without_a_prompt_says_what_it_may_hold(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system, grpc.aio.insecure_channel(system.address) as channel:
        data = pb.GenerateRequest(model="scripted").SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _raw("/pdserve.v1.Generation/Generate", data)(channel)
        assert "one of text, token_ids and chat" in (caught.value.details() or "")
        trailing = dict(caught.value.trailing_metadata() or ())
        assert trailing["pdserve-error"] == "InvalidRequest"
        assert trailing["pdserve-error-field"] == "prompt"


@scenario
async def test_a_chat_with_a_model_that_has_no_template_is_refused(tmp_path: Path) -> None:
    async with deployed(tmp_path, chat=False) as system:
        with pytest.raises(InvalidRequest, match="no chat template"):
            await system.client.generate(messages=[{"role": "user", "content": "hi"}])


@scenario
async def test_an_identifier_that_is_in_use_is_refused(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        decode = system.worker("decode-0")
        decode.allow(2)
        first = asyncio.create_task(system.client.generate(PROMPT, max_tokens=9, request_id="mine"))
        await decode.until(StartDecode)
        with pytest.raises(InvalidRequest, match="no running request has"):
            await system.client.generate(PROMPT, request_id="mine")
        decode.allow(None)
        assert (await first).request_id == "mine"
