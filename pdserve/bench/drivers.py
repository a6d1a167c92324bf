"""How a server is asked: pdserve's gRPC, or an endpoint that speaks OpenAI's protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator

from pdserve.bench.asks import Ask, Driver, Piece
from pdserve.bench.openai import OpenAiDriver
from pdserve.bench.scenario import Protocol, SystemSpec
from pdserve.bench.workload import ServerLimits
from pdserve.client import Access, AsyncClient
from pdserve.core.errors import ConfigError, ModelNotFound


def make_driver(spec: SystemSpec, address: str, access: Access | None = None) -> Driver:
    """Must be called inside the event loop it is used on. `access`: of gRPC servers that were running."""
    match spec.protocol:
        case Protocol.GRPC:
            model = spec.model if spec.address else None
            return GrpcDriver(address, model, _access(spec, access or Access()))
        case Protocol.OPENAI:
            return OpenAiDriver(address, spec)


def _access(spec: SystemSpec, given: Access) -> Access:
    """What is said of this very system goes before what is said of all."""
    if spec.address is None:
        return Access()
    return dataclasses.replace(
        given, api_key=spec.api_key or given.api_key, ca_file=spec.ca_file or given.ca_file
    )


class GrpcDriver:
    def __init__(self, address: str, model: str | None, access: Access | None = None) -> None:
        self._client, self._model = AsyncClient(address, access=access or Access()), model

    async def limits(self) -> ServerLimits:
        cards = await self._client.list_models()
        names = [card.name for card in cards]
        if self._model is None and len(cards) != 1:
            raise ConfigError(f"the server has {len(cards)} models; name one: {', '.join(names) or 'none'}")
        wanted = self._model or names[0]
        for card in cards:
            if card.name == wanted:
                return ServerLimits(vocab_size=card.vocab_size, max_model_len=card.max_model_len)
        raise ModelNotFound(wanted, names)

    async def is_ready(self) -> bool:
        return any(card.ready for card in await self._client.list_models())

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        deltas = self._client.stream(
            prompt_token_ids=ask.token_ids,
            model=self._model,
            max_tokens=ask.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            priority=ask.priority,
        )
        try:
            async for delta in deltas:
                usage = delta.usage
                yield Piece(
                    num_tokens=len(delta.token_ids),
                    token_ids=delta.token_ids,
                    done=usage is not None,
                    prompt_tokens=usage.prompt_tokens if usage else None,
                    cached_tokens=usage.cached_prompt_tokens if usage else 0,
                    output_tokens=usage.completion_tokens if usage else None,
                    timings=delta.timings,
                )
        finally:
            await deltas.aclose()

    async def close(self) -> None:
        await self._client.close()
