"""Endpoints that speak OpenAI's completions or chat completions, streamed: vLLM, SGLang, Dynamo, ..."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Final

import aiohttp
from pydantic import JsonValue

from pdserve.bench.asks import Ask, Piece, Role, Said
from pdserve.bench.scenario import Endpoint, SystemSpec
from pdserve.bench.workload import ServerLimits
from pdserve.core.errors import ConfigError, ModelNotFound, PdServeError, WorkerLost

Json = dict[str, JsonValue]

_UNKNOWN_CONTEXT: Final = 1_000_000
_PROBE_WORDS: Final = (8, 72)
_PATHS: Final = {Endpoint.COMPLETIONS: "/v1/completions", Endpoint.CHAT: "/v1/chat/completions"}
_TO_BE_DECODED_ELSEWHERE: Final[Json] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class HttpRefusal(PdServeError):
    """The endpoint answered with something other than 200."""


class OpenAiDriver:
    """Must be made inside the event loop it is used on. Raises `ConfigError` for a wrong `ca_file`."""

    def __init__(self, base_url: str, spec: SystemSpec) -> None:
        self._base, self._prefill = (
            _root_of(base_url),
            spec.prefill_address and _root_of(spec.prefill_address),
        )
        self._spec, self._model = spec, spec.model
        self._tokens_per_word = 1.0
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {spec.api_key}"} if spec.api_key else {},
            # A limit would hold requests back here and hide them from the server.
            connector=aiohttp.TCPConnector(limit=0, ssl=_tls(spec.ca_file)),
            timeout=aiohttp.ClientTimeout(total=None, connect=30),
            read_bufsize=2**20,
        )

    async def limits(self) -> ServerLimits:
        limits = await self._listed_limits()
        if self._sends_text and self._tokens_per_word == 1.0:
            self._tokens_per_word = await self._measured_tokens_per_word()
        return limits

    async def is_ready(self) -> bool:
        for base in filter(None, (self._base, self._prefill)):
            await self._cards(base)
        return True

    @property
    def _sends_text(self) -> bool:
        return self._spec.text_prompts or self._spec.endpoint is Endpoint.CHAT

    async def _listed_limits(self) -> ServerLimits:
        cards = await self._cards(self._base)
        if cards is None:
            if self._model is None:
                raise ConfigError(f"{self._base} does not list its models; name one")
            return self._limits_of({})
        if self._model is None and len(cards) != 1:
            raise ConfigError(f"{self._base} has {len(cards)} models; name one: {', '.join(cards) or 'none'}")
        self._model = self._model or next(iter(cards))
        if self._model not in cards:
            raise ModelNotFound(self._model, list(cards))
        return self._limits_of(cards[self._model])

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        body = self._body(ask)
        usage: Mapping[str, JsonValue] = {}
        counted = 0
        try:
            if self._prefill is not None:
                body["kv_transfer_params"] = await self._read_elsewhere(body)
            async with self._session.post(self._base + _PATHS[self._spec.endpoint], json=body) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text())
                async for event in _events(response.content):
                    if isinstance(said := event.get("usage"), dict):
                        usage = said
                    if piece := _piece(event, counted):
                        counted += piece.num_tokens
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

    async def _measured_tokens_per_word(self) -> float:
        """From the usage of two prompts: what templates add to both cancels. 1 where there is no usage."""
        counts = []
        for words in _PROBE_WORDS:
            ids = tuple(range(1000, 1000 + words))
            probe = Ask(turns=[Said(role=Role.USER, token_ids=ids)], output_tokens=1)
            pieces = [piece async for piece in self.stream(probe)]
            counts += [piece.prompt_tokens for piece in pieces if piece.prompt_tokens is not None]
        if len(counts) < len(_PROBE_WORDS):
            return 1.0
        return max(1.0, (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0]))

    def _body(self, ask: Ask) -> Json:
        prompt: Json
        scale = self._tokens_per_word
        if self._spec.endpoint is Endpoint.CHAT:
            prompt = {
                "messages": [{"role": said.role.value, "content": said.words(scale)} for said in ask.turns]
            }
        elif self._spec.text_prompts:
            prompt = {"prompt": " ".join(said.words(scale) for said in ask.turns)}
        else:
            prompt = {"prompt": list(ask.token_ids)}
        return {
            "model": self._model,
            **prompt,
            "max_tokens": ask.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._spec.extra_body,
        }

    async def _read_elsewhere(self, body: Json) -> JsonValue:
        """As vLLM's own proxy: one token from the prefill instance, which keeps the KV and says where."""
        first = {key: value for key, value in body.items() if key != "stream_options"}
        first |= {"max_tokens": 1, "stream": False, "kv_transfer_params": _TO_BE_DECODED_ELSEWHERE}
        async with self._session.post(
            f"{self._prefill}{_PATHS[self._spec.endpoint]}", json=first
        ) as response:
            text = await response.text()
            if response.status != 200:
                raise _refusal(response.status, text)
        handed_over = _object(text, str(self._prefill)).get("kv_transfer_params")
        if not isinstance(handed_over, dict):
            raise HttpRefusal(f"{self._prefill} gave no kv_transfer_params: nothing would be transferred")
        return handed_over

    async def _cards(self, base: str) -> dict[str, Mapping[str, JsonValue]] | None:
        """The server's models by name; None when it has no such list."""
        try:
            async with self._session.get(f"{base}/v1/models") as response:
                text = await response.text()
                if response.status == 404:
                    return None
                if response.status != 200:
                    raise WorkerLost(base, f"/v1/models answered {response.status}: {text[:200]}")
                return {card["id"]: card for card in json.loads(text)["data"]}
        except (aiohttp.ClientError, TimeoutError) as error:
            raise WorkerLost(base, str(error) or type(error).__name__) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{base}/v1/models is no OpenAI model list: {error!r}") from error

    def _limits_of(self, card: Mapping[str, JsonValue]) -> ServerLimits:
        context = card.get("max_model_len")
        return ServerLimits(
            vocab_size=self._spec.vocab_size,
            max_model_len=context if isinstance(context, int) and context > 1 else _UNKNOWN_CONTEXT,
        )


def _root_of(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _tls(ca_file: Path | None) -> ssl.SSLContext | bool:
    """True: the system's authorities."""
    try:
        return True if ca_file is None else ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ca_file {ca_file}: {error}") from error


def _refusal(status: int, text: str) -> PdServeError:
    return HttpRefusal(f"HTTP {status}: {' '.join(text[:300].split())}")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[Json]:
    async for raw in content:
        line = raw.strip()
        if not line.startswith(b"data:") or line == b"data: [DONE]":
            continue
        event = _object(line[5:].decode(errors="replace"), "an event of the stream")
        if event.get("error"):
            raise HttpRefusal(str(event["error"])[:300])
        yield event


def _object(text: str, what: str) -> Json:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise HttpRefusal(f"{what} is no JSON: {text[:100]!r}") from error
    return found if isinstance(found, dict) else {}


def _piece(event: Mapping[str, JsonValue], counted: int) -> Piece | None:
    """`counted`: tokens of the answer so far."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    choice = choices[0]
    text, hidden = _text_of(choice)
    ids = choice.get("token_ids")
    known = tuple(token for token in ids if isinstance(token, int)) if isinstance(ids, list) else ()
    if known:
        return Piece(num_tokens=len(known), token_ids=known, text=text)
    # Usage in every message (vLLM's and SGLang's continuous_usage_stats) counts exactly.
    usage = event.get("usage")
    so_far = _count(usage, "completion_tokens") if isinstance(usage, dict) else None
    if so_far is not None:
        return Piece(num_tokens=so_far - counted, text=text) if so_far > counted else None
    # Else a message is taken for one token; the usage at the end says how many there were in all.
    return Piece(num_tokens=1, text=text) if text or hidden else None


def _text_of(choice: Mapping[str, JsonValue]) -> tuple[str, bool]:
    """What a later turn repeats, and whether there is text (reasoning) that it does not."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        text = choice.get("text")
        return (text if isinstance(text, str) else ""), False
    content = delta.get("content")
    hidden = bool(delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"))
    return (content if isinstance(content, str) else ""), hidden


def _count(usage: Mapping[str, JsonValue], name: str) -> int | None:
    count = usage.get(name)
    return count if isinstance(count, int) else None
