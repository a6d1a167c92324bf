"""The HTTP peers' endpoints: POST /v1/completions, streamed, and whatever else streams events as it does."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import TypeAlias

import aiohttp

from benchmarks.system import Answer

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


class HttpError(Exception):
    """The server refused a request, or its stream broke."""


class CompletionsClient:
    """Connections to one server. Must be made inside a running event loop, and closed."""

    def __init__(self, base_url: str, *, timeout_s: float = 300.0) -> None:
        self._session = aiohttp.ClientSession(
            base_url,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            # A server that was frozen has dropped the connections it kept alive: open one per request.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def close(self) -> None:
        await self._session.close()

    async def is_healthy(self) -> bool:
        try:
            async with self._session.get("/health", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def complete(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """The whole answer at once."""
        async with self._session.post("/v1/completions", json=dict(body)) as response:
            text = await response.text()
            if response.status != 200:
                raise HttpError(f"{response.status}: {text[:500]}")
            answer = json.loads(text)
            if not isinstance(answer, dict):
                raise HttpError(f"wanted an object, got {text[:200]}")
            return answer

    async def stream(self, body: Mapping[str, Json], *, sent_s: float | None = None) -> Answer:
        """Stream an answer and time it. `sent_s`: when the request began, if before this call."""
        started_s = time.perf_counter() if sent_s is None else sent_s
        first_s = last_s = 0.0
        prompt_tokens = output_tokens = 0
        async for event in self.events("/v1/completions", body):
            now_s = time.perf_counter()
            if "error" in event:
                raise HttpError(str(event["error"])[:500])
            if _has_text(event):
                first_s = first_s or now_s
                last_s = now_s
            usage = event.get("usage")
            if isinstance(usage, dict):
                prompt_tokens, output_tokens = _count(usage, "prompt"), _count(usage, "completion")
        if not first_s:
            raise HttpError("the stream held no token")
        return Answer(
            sent_s=started_s,
            first_s=first_s,
            last_s=last_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )

    async def events(self, path: str, body: Mapping[str, Json]) -> AsyncIterator[dict[str, Json]]:
        """What an endpoint streams for a request, event by event. Raises `HttpError` where it refuses."""
        async with self._session.post(path, json={**body, "stream": True}) as response:
            if response.status != 200:
                raise HttpError(f"{response.status}: {(await response.text())[:500]}")
            async for raw in response.content:
                line = raw.strip()
                if line.startswith(b"data:") and line != b"data: [DONE]":
                    event = json.loads(line[5:])
                    if isinstance(event, dict):
                        yield event


def _has_text(event: Mapping[str, Json]) -> bool:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return False
    # Servers that are asked for token ids say them even when the text is held back (half a character).
    return bool(choices[0].get("text") or choices[0].get("token_ids"))


def _count(usage: Mapping[str, Json], what: str) -> int:
    count = usage.get(f"{what}_tokens")
    return count if isinstance(count, int) else 0
