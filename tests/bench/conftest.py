"""Servers that answer as they are told, behind real gRPC and real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from aiohttp import web

from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.proto.pdserve.v1 import generation_pb2_grpc
from tests.support.certificates import Pair

Gate = Callable[[], Awaitable[None]]


async def _open() -> None:
    return None


class FakeService(generation_pb2_grpc.GenerationServicer):
    """Waits at `gate`, then answers at once with as many tokens as were asked for."""

    def __init__(self) -> None:
        self.gate: Gate = _open
        self.prompts: list[list[int]] = []
        self.keys: list[str] = []
        self.refuse: grpc.StatusCode | None = None

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        card = pb.ModelCard(name="fake", max_model_len=256, vocab_size=512, ready=True)
        return pb.ListModelsResponse(models=[card])

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateDelta]:
        prompt = list(request.token_ids.ids)
        self.prompts.append(prompt)
        sent = dict(context.invocation_metadata() or ())
        self.keys.append(str(sent.get("authorization", "")))
        if self.refuse is not None:
            await context.abort(self.refuse, "no")
        await self.gate()
        count = request.sampling.max_tokens
        for index in range(count):
            last = index == count - 1
            delta = pb.GenerateDelta(request_id="r", token_ids=[index + 1], text="x")
            if last:
                delta.finish_reason = pb.FINISH_REASON_LENGTH
                delta.usage.prompt_tokens = len(prompt)
                delta.usage.completion_tokens = count
                delta.timings.queue_s = 0.001
                delta.timings.prefill_s = 0.002
                delta.timings.transfer_exposed_s = 0.001
                delta.timings.bytes_moved = 4096
            yield delta


@contextlib.asynccontextmanager
async def grpc_server(service: FakeService, pair: Pair | None = None) -> AsyncIterator[str]:
    """pair: TLS with this certificate."""
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
    if pair is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        ours = [(pair.key.read_bytes(), pair.cert.read_bytes())]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(ours))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class FakeOpenAi:
    """A word is three tokens to it, and a chat template nine more."""

    def __init__(self) -> None:
        self.gate: Gate = _open
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.status = 200
        self.has_models = True
        self.is_prefill = False
        self.handed_over: dict[str, int] | None = {"block": 7}
        self.tokens_per_message = 1

    async def models(self, request: web.Request) -> web.Response:
        if not self.has_models:
            return web.Response(status=404)
        return web.json_response({"data": [{"id": "fake", "max_model_len": 256}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        if self.status != 200:
            return web.Response(status=self.status, text="too much")
        await self.gate()
        if self.is_prefill:
            return web.json_response({"choices": [{"text": "x"}], "kv_transfer_params": self.handed_over})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        prompt_tokens, written, wanted = _prompt_tokens(body), 0, body["max_tokens"]
        if "messages" in body:
            await _send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        while written < wanted:
            count = min(self.tokens_per_message, wanted - written)
            written += count
            text = " x" * count
            event: dict[str, Any] = {"choices": [{"text": text}]}
            if "messages" in body:
                event = {"choices": [{"delta": {"content": text}}]}
            if body["stream_options"].get("continuous_usage_stats"):
                event["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": written}
            await _send(response, event)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": wanted}
        await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


def _prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return 9 + sum(3 * len(message["content"].split()) for message in body["messages"])
    prompt = body["prompt"]
    return 3 * len(prompt.split()) if isinstance(prompt, str) else len(prompt)


async def _send(response: web.StreamResponse, event: dict[str, object]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@contextlib.asynccontextmanager
async def openai_server(fake: FakeOpenAi, pair: Pair | None = None) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/completions", fake.completions)
    app.router.add_post("/v1/chat/completions", fake.completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    tls = None
    if pair is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(pair.cert, pair.key)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


class Stall:
    """Lets everyone through except between `since_s` and `until_s` after its first guest."""

    def __init__(self, since_s: float, until_s: float) -> None:
        self._since_s, self._until_s = since_s, until_s
        self._began: float | None = None

    async def __call__(self) -> None:
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        if self._since_s <= now - self._began < self._until_s:
            await asyncio.sleep(self._until_s - (now - self._began))


@pytest.fixture
def fake_grpc() -> tuple[FakeService, Callable[..., contextlib.AbstractAsyncContextManager[str]]]:
    service = FakeService()
    return service, lambda pair=None: grpc_server(service, pair)


@pytest.fixture
def fake_openai() -> tuple[FakeOpenAi, Callable[..., contextlib.AbstractAsyncContextManager[str]]]:
    fake = FakeOpenAi()
    return fake, lambda pair=None: openai_server(fake, pair)


@pytest.fixture
def another_openai() -> tuple[FakeOpenAi, Callable[..., contextlib.AbstractAsyncContextManager[str]]]:
    fake = FakeOpenAi()
    return fake, lambda pair=None: openai_server(fake, pair)


@pytest.fixture
def make_stall() -> Callable[[float, float], Stall]:
    return Stall
