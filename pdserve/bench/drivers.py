"""How a server is asked: pdserve's gRPC, or any endpoint that speaks OpenAI's completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import aiohttp

from pdserve.bench.scenario import Protocol as Spoken
from pdserve.bench.scenario import SystemSpec
from pdserve.bench.workload import ServerLimits
from pdserve.client import AsyncClient, Timings
from pdserve.core.errors import ConfigError, ModelNotFound, PdServeError, WorkerLost

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"

_UNKNOWN_CONTEXT: Final = 1_000_000
_SYLLABLES: Final = (
    "ba",
    "de",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "ri",
    "so",
    "tu",
    "va",
    "we",
    "xi",
    "yo",
    "za",
    "fi",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One message of an answer. The last has `done`; its counts are the server's own, where it gives any."""

    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """Empty when the server sends text alone."""
    done: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    token_ids: Sequence[int]
    output_tokens: int
    priority: int = 0


class Driver(Protocol):
    async def limits(self) -> ServerLimits:
        """What the server takes. Raises a `PdServeError` when it cannot be reached or lacks the model."""

    def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """Raises a `PdServeError` when the server refuses or its stream breaks."""

    async def close(self) -> None: ...


def make_driver(spec: SystemSpec, address: str) -> Driver:
    """Must be called inside the event loop it is used on."""
    match spec.protocol:
        case Spoken.GRPC:
            return GrpcDriver(address, spec.model if spec.address else None)
        case Spoken.OPENAI:
            return OpenAiDriver(address, spec)


class GrpcDriver:
    def __init__(self, address: str, model: str | None) -> None:
        self._client, self._model = AsyncClient(address), model

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


class OpenAiDriver:
    """POST /v1/completions, streamed (vLLM, SGLang, Dynamo, ...)."""

    def __init__(self, base_url: str, spec: SystemSpec) -> None:
        headers = {"Authorization": f"Bearer {spec.api_key}"} if spec.api_key else {}
        self._base, self._spec, self._model = base_url.rstrip("/"), spec, spec.model
        self._session = aiohttp.ClientSession(
            headers=headers,
            # A limit would hold requests back here and hide them from the server.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=30),
            read_bufsize=2**20,
        )

    async def limits(self) -> ServerLimits:
        try:
            async with self._session.get(f"{self._base}/v1/models") as response:
                text = await response.text()
                if response.status != 200:
                    raise WorkerLost(self._base, f"/v1/models answered {response.status}: {text[:200]}")
                listed = json.loads(text)["data"]
                cards = {card["id"]: card for card in listed}
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerLost(self._base, str(error) or type(error).__name__) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._base}/v1/models is no OpenAI model list: {error!r}") from error
        if self._model is None and len(cards) != 1:
            raise ConfigError(f"{self._base} has {len(cards)} models; name one: {', '.join(cards) or 'none'}")
        self._model = self._model or next(iter(cards))
        if self._model not in cards:
            raise ModelNotFound(self._model, list(cards))
        context = cards[self._model].get("max_model_len")
        return ServerLimits(
            vocab_size=self._spec.vocab_size,
            max_model_len=context if isinstance(context, int) and context > 1 else _UNKNOWN_CONTEXT,
        )

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        body: dict[str, Json] = {
            "model": self._model,
            "prompt": as_words(ask.token_ids) if self._spec.text_prompts else list(ask.token_ids),
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._spec.extra_body,
        }
        usage: Mapping[str, Json] = {}
        try:
            async with self._session.post(f"{self._base}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise _refusal(response.status, (await response.text())[:300])
                async for event in _events(response.content):
                    if isinstance(event.get("usage"), dict):
                        usage = event["usage"]  # type: ignore[assignment]  # narrowed above
                    if piece := _piece(event):
                        yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerLost(self._base, str(error) or type(error).__name__) from error
        details = usage.get("prompt_tokens_details")
        cached = _count(details, "cached_tokens") if isinstance(details, dict) else None
        yield Piece(
            done=True,
            prompt_tokens=_count(usage, "prompt_tokens"),
            cached_tokens=cached or 0,
            output_tokens=_count(usage, "completion_tokens"),
        )

    async def close(self) -> None:
        await self._session.close()


def as_words(token_ids: Sequence[int]) -> str:
    """A made-up word for every id: for servers that take only text. Equal ids, equal words."""
    return " ".join("".join(_SYLLABLES[(token >> shift) & 15] for shift in (0, 4, 8)) for token in token_ids)


class HttpRefusal(PdServeError):
    """The endpoint answered with something other than 200."""


def _refusal(status: int, text: str) -> PdServeError:
    return HttpRefusal(f"HTTP {status}: {' '.join(text.split())}")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Json]]:
    async for raw in content:
        line = raw.strip()
        if not line.startswith(b"data:") or line == b"data: [DONE]":
            continue
        try:
            event = json.loads(line[5:])
        except ValueError as error:
            raise HttpRefusal(f"an event of the stream is no JSON: {line[:100]!r}") from error
        if not isinstance(event, dict):
            continue
        if event.get("error"):
            raise HttpRefusal(str(event["error"])[:300])
        yield event


def _piece(event: Mapping[str, Json]) -> Piece | None:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    ids = choices[0].get("token_ids")
    known = tuple(token for token in ids if isinstance(token, int)) if isinstance(ids, list) else ()
    if known:
        return Piece(num_tokens=len(known), token_ids=known)
    # Without ids a message is taken for one token; the usage at the end says how many there were in all.
    return Piece(num_tokens=1) if choices[0].get("text") else None


def _count(usage: Mapping[str, Json], name: str) -> int | None:
    count = usage.get(name)
    return count if isinstance(count, int) else None
