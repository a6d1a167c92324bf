"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from pdserve.client.answers import Completion, Delta, Model, completion_from, delta_from, model_from
from pdserve.client.channel import DEFAULT_TIMEOUT_S, OPEN_ACCESS, SERVICE, Access
from pdserve.client.failures import error_from
from pdserve.client.requests import Messages, RequestOptions, build_request
from pdserve.core.errors import PdServeError
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb


class AsyncClient:
    """`Client` for asyncio: same methods, same errors. Use it on the event loop it was made on.

    Cancelling the task, and leaving a stream early, cancel the request. A stream that is left early is closed
    at once inside `contextlib.aclosing`, and soon otherwise.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        access: Access = OPEN_ACCESS,
    ) -> None:
        """access: API key and TLS files. Connects on the first call. Raises `ConfigError` for wrong files."""
        self._timeout_s = timeout_s
        self._channel = access.aio_channel(address)
        self._generate = self._channel.unary_unary(
            f"{SERVICE}Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        self._stream = self._channel.unary_stream(
            f"{SERVICE}GenerateStream", pb.GenerateRequest.SerializeToString, pb.GenerateDelta.FromString
        )
        self._list_models = self._channel.unary_unary(
            f"{SERVICE}ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString
        )

    async def generate(
        self,
        prompt: str | None = None,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The whole answer. Give exactly one of prompt, prompt_token_ids and messages.

        Raises a `PdServeError`: `InvalidRequest`, `ModelNotFound`, `Overloaded` (with `retry_after_s`), ...
        """
        request = build_request(prompt, prompt_token_ids, messages, options)
        try:
            return completion_from(await self._generate(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as failure:
            raise _typed(failure) from failure

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Delta]:
        """The answer as it is written; raises as `generate` does, at the first step or in the middle."""
        request = build_request(prompt, prompt_token_ids, messages, options)
        return self._deltas(request)

    async def list_models(self) -> list[Model]:
        try:
            response = await self._list_models(pb.ListModelsRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise _typed(failure) from failure
        return [model_from(card) for card in response.models]

    async def close(self) -> None:
        """End running calls and the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _deltas(self, request: pb.GenerateRequest) -> AsyncGenerator[Delta]:
        call = self._stream(request, timeout=self._timeout_s)
        try:
            async for wire in call:
                yield delta_from(wire)
        except grpc.aio.AioRpcError as failure:
            raise _typed(failure) from failure
        finally:
            call.cancel()


def _typed(failure: grpc.aio.AioRpcError) -> PdServeError:
    return error_from(failure.code(), failure.details() or "", failure.trailing_metadata() or ())
