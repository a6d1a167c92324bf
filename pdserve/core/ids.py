"""Identifiers. A NewType each, so that mypy keeps a block from being used as a worker."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
"""Minted once by the gateway (or taken from the client); stable across attempts."""

WorkerId = NewType("WorkerId", str)
"""Readable and stable across restarts of the process, such as ``prefill-0``."""

BlockId = NewType("BlockId", int)
"""Index of a block in one worker's KV pool."""


@dataclass(frozen=True, slots=True, order=True)
class AttemptId:
    """One try at a request. Messages that carry an older attempt than the current one are ignored."""

    request: RequestId
    epoch: int

    def next(self) -> AttemptId:
        return AttemptId(self.request, self.epoch + 1)

    def __str__(self) -> str:
        return f"{self.request}#{self.epoch}"


def new_request_id() -> RequestId:
    """A request id that cannot be guessed, 24 hex digits after ``req-``."""
    return RequestId(f"req-{secrets.token_hex(12)}")


def child_request_id(parent: RequestId, index: int) -> RequestId:
    """The id of sample `index` of a request with n > 1."""
    return RequestId(f"{parent}.{index}")
