"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc

from pdserve.client.answers import Completion, Delta, Model, completion_from, delta_from, model_from
from pdserve.client.channel import DEFAULT_TIMEOUT_S, OPEN_ACCESS, SERVICE, Access
from pdserve.client.failures import error_from
from pdserve.client.requests import Messages, RequestOptions, build_request
from pdserve.core.errors import PdServeError
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb


class Client:
    """Safe to share between threads. `timeout_s` bounds every call; `deadline_s` of a request goes below it.

    Errors are pdserve's own (`pdserve.core.errors`). Ctrl-C, and leaving a stream early, cancel the request.
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
        self._channel = access.channel(address)
        self._generate = self._channel.unary_unary(
            f"{SERVICE}Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        self._stream = self._channel.unary_stream(
            f"{SERVICE}GenerateStream", pb.GenerateRequest.SerializeToString, pb.GenerateDelta.FromString
        )
        self._list_models = self._channel.unary_unary(
            f"{SERVICE}ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString
        )

    def generate(
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
        call = self._generate.future(request, timeout=self._timeout_s)
        try:
            return completion_from(call.result())
        except grpc.RpcError as failure:
            raise _typed(failure) from failure
        finally:
            call.cancel()  # type: ignore[no-untyped-call]  # does nothing to a call that has ended

    def stream(
        self,
        prompt: str | None = None,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generator[Delta]:
        """The answer as it is written; raises as `generate` does, at the first `next` or in the middle."""
        request = build_request(prompt, prompt_token_ids, messages, options)
        return self._deltas(request)

    def list_models(self) -> list[Model]:
        try:
            response = self._list_models(pb.ListModelsRequest(), timeout=self._timeout_s)
        except grpc.RpcError as failure:
            raise _typed(failure) from failure
        return [model_from(card) for card in response.models]

    def close(self) -> None:
        """End running calls and the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deltas(self, request: pb.GenerateRequest) -> Generator[Delta]:
        call = self._stream(request, timeout=self._timeout_s)
        try:
            for wire in call:
                yield delta_from(wire)
        except grpc.RpcError as failure:
            raise _typed(failure) from failure
        finally:
            call.cancel()  # type: ignore[no-untyped-call]  # the stubs miss its return type


def _typed(failure: grpc.RpcError) -> PdServeError:
    # What the stubs call RpcError is at run time always a Call, which has these.
    code, details, metadata = failure.code(), failure.details(), failure.trailing_metadata()
    return error_from(code, details or "", metadata or ())
