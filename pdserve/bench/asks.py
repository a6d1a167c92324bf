"""What a server is asked, and how its answer arrives: the same for every protocol."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from pdserve.bench.workload import ServerLimits
from pdserve.client import Timings

_SYLLABLES: Final = tuple(map("".join, itertools.product("bklmnprs", "ae")))


class Role(StrEnum):
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One turn of a conversation."""

    role: Role
    token_ids: tuple[int, ...]
    text: str = ""
    """As the server wrote it; empty where it is made of the ids."""

    def words(self, tokens_per_word: float = 1.0) -> str:
        return self.text or as_words(self.token_ids, tokens_per_word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    turns: Sequence[Said]
    output_tokens: int
    priority: int = 0

    @property
    def token_ids(self) -> list[int]:
        """The whole prompt."""
        return [token for said in self.turns for token in said.token_ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One message of an answer. The last has `done`; its counts are the server's own, where it gives any."""

    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """Empty when the server sends text alone."""
    text: str = ""
    done: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None
    timings: Timings | None = None


class Driver(Protocol):
    async def limits(self) -> ServerLimits:
        """What the server takes. Raises a `PdServeError` when it cannot be reached or lacks the model."""

    async def is_ready(self) -> bool:
        """Could it answer now? Raises as `limits`."""

    def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """Raises a `PdServeError` when the server refuses or its stream breaks."""

    async def close(self) -> None: ...


def as_words(token_ids: Sequence[int], tokens_per_word: float = 1.0) -> str:
    """Made-up words for servers that take only text, with about as many tokens as there are ids.

    Equal ids, equal words. Ids are left out evenly, so that prompts share as much as before.
    """
    count = math.ceil(len(token_ids) / tokens_per_word)
    kept = [token_ids[int(index * tokens_per_word)] for index in range(count)]
    return " ".join("".join(_SYLLABLES[(token >> shift) & 15] for shift in (0, 4, 8)) for token in kept)
