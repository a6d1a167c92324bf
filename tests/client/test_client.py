"""The blocking client, the asyncio client, and the errors both raise."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdserve.client import AsyncClient, Client
from pdserve.client.failures import error_from
from pdserve.client.requests import build_request
from pdserve.core import errors
from pdserve.core.messages import Cancel, FinishReason, StartDecode
from tests.support.deployment import deployed, scenario
from tests.support.model_workers import continuation
from tests.support.paths import REPO

PROMPT = "hello"
ANSWER = "".join(map(chr, continuation([ord(c) for c in PROMPT], 12)))

Status = grpc.StatusCode


def with_client(address: str, body: Callable[[Client], Any]) -> Any:
    with Client(address, timeout_s=20) as client:
        return body(client)


@scenario
async def test_the_blocking_client_generates_and_streams_the_same_answer(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:

        def both(client: Client) -> tuple[str, str, FinishReason]:
            whole = client.generate(PROMPT, max_tokens=12)
            streamed = "".join(delta.text for delta in client.stream(PROMPT, max_tokens=12))
            return whole.text, streamed, whole.finish_reason

        assert await asyncio.to_thread(with_client, system.address, both) == (
            ANSWER,
            ANSWER,
            FinishReason.LENGTH,
        )


@scenario
async def test_an_address_may_be_written_as_an_url(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        models = await asyncio.to_thread(
            with_client, f"grpc://{system.address}", lambda client: client.list_models()
        )
        assert [(model.name, model.ready) for model in models] == [("scripted", True)]


@scenario
async def test_leaving_a_blocking_stream_cancels_the_request(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        decode = system.worker("decode-0")
        decode.allow(2)

        def leave(client: Client) -> None:
            with contextlib.closing(client.stream(PROMPT, max_tokens=400)) as stream:
                next(stream)

        left = asyncio.create_task(asyncio.to_thread(with_client, system.address, leave))
        await decode.until(Cancel)
        await left


@scenario
async def test_typed_errors_come_out_of_the_blocking_client(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:

        def wrong(client: Client) -> list[errors.PdServeError]:
            caught = []
            for call in (
                lambda: client.generate(PROMPT, temperature=-1.0),
                lambda: next(client.stream(PROMPT, model="other")),
                lambda: client.generate(PROMPT, deadline_s=1e-6),
            ):
                with pytest.raises(errors.PdServeError) as raised:
                    call()
                caught.append(raised.value)
            return caught

        field, model, late = await asyncio.to_thread(with_client, system.address, wrong)
        assert isinstance(field, errors.InvalidRequest)
        assert str(field) == "temperature: got -1.0, must be in [0, 100]"
        assert (field.field, field.value, field.limit) == ("temperature", "-1.0", "in [0, 100]")
        assert isinstance(model, errors.ModelNotFound)
        assert model.model == "other"
        assert isinstance(late, errors.DeadlineExceeded)


_STREAMING = """
import sys
from pdserve.client import Client
for delta in Client(sys.argv[1]).stream("hello", max_tokens=400):
    print("ready", flush=True)
"""
_GENERATING = """
import sys
from pdserve.client import Client
client = Client(sys.argv[1])
print("ready", flush=True)
client.generate("hello", max_tokens=400)
"""


@pytest.mark.parametrize("script", [_STREAMING, _GENERATING], ids=["stream", "generate"])
@scenario
async def test_ctrl_c_cancels_the_request(tmp_path: Path, script: str) -> None:
    async with deployed(tmp_path) as system:
        decode = system.worker("decode-0")
        decode.allow(3)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, system.address, cwd=REPO, stdout=pipe, stderr=pipe
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        await decode.until(StartDecode)
        process.send_signal(signal.SIGINT)
        await decode.until(Cancel)
        _, complaint = await process.communicate()
        assert complaint.splitlines()[-1] == b"KeyboardInterrupt"
        await decode.until_idle()


@scenario
async def test_nobody_at_the_address_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_s=5) as client:
        with pytest.raises(errors.WorkerLost):
            await client.list_models()


def test_exactly_one_kind_of_prompt_is_given() -> None:
    for arguments in ((None, None, None), ("a", [1], None), ("a", None, [{"role": "user", "content": "x"}])):
        with pytest.raises(errors.InvalidRequest, match="exactly one of prompt"):
            build_request(*arguments, {})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_what_cannot_be_sent_is_named(options: Any, field: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        build_request("a", None, None, options)
    assert caught.value.field == field


def test_options_that_are_none_are_left_to_the_server() -> None:
    request = build_request("a", None, None, {"temperature": None, "top_k": 0, "stop": "x", "deadline_s": 2})
    assert not request.sampling.HasField("temperature")
    assert request.sampling.HasField("top_k")
    assert list(request.sampling.stop) == ["x"]
    assert request.deadline_ms == 2000.0


def test_every_error_a_server_can_send_comes_back_as_what_it_was() -> None:
    from coordinator.wire import status_of

    samples: list[errors.PdServeError] = [
        errors.InvalidRequest(field="n", value=0, limit="at least 1"),
        errors.PromptTooLong(prompt_tokens=9, max_model_len=4),
        errors.ModelNotFound("x", ["y"]),
        errors.Overloaded("queue", retry_after_s=1.5),
        errors.NoWorkers("decode", "m"),
        errors.WorkerLost("decode-0", "gone"),
        errors.DeadlineExceeded("late"),
        errors.RequestCancelled("left"),
        errors.TransferError("cable"),
        errors.CorruptTransfer("digest"),
        errors.ConfigError("port"),
        errors.PdServeError("our own bug"),
    ]
    for error in samples:
        code, details, metadata = status_of(error)
        again = error_from(code, details, metadata)
        assert type(again) is type(error)
        assert str(error) in str(again)
        assert again.retryable == error.retryable
    again = error_from(*status_of(samples[3]))
    assert isinstance(again, errors.Overloaded)
    assert again.retry_after_s == 1.5


def test_a_status_without_our_metadata_still_has_a_type() -> None:
    kinds = {
        Status.UNAVAILABLE: errors.WorkerLost,
        Status.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
        Status.CANCELLED: errors.RequestCancelled,
        Status.RESOURCE_EXHAUSTED: errors.Overloaded,
        Status.UNIMPLEMENTED: errors.PdServeError,
    }
    for code, kind in kinds.items():
        assert type(error_from(code, "text", ())) is kind
    too_large = error_from(Status.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)", ())
    assert isinstance(too_large, errors.InvalidRequest)


def test_the_client_needs_neither_torch_nor_a_server_package() -> None:
    script = (
        "import sys, pdserve.client\n"
        "heavy = ('torch', 'ray', 'coordinator', 'transformers', 'tokenizers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
