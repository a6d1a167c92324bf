"""How both clients reach a server."""

from __future__ import annotations

from typing import Final

MIB: Final = 2**20
OPTIONS: Final = (
    ("grpc.max_receive_message_length", -1),  # an answer with prompt log-probabilities may be long
    ("grpc.max_send_message_length", -1),  # the server says what is too long, and names its limit
    ("grpc.keepalive_time_ms", 30_000),
)
SERVICE: Final = "/pdserve.v1.Generation/"
DEFAULT_TIMEOUT_S: Final = 600.0


def target_of(address: str) -> str:
    """`host:port`, `unix:/path` or `dns:///name:port`; a leading `grpc://` is taken off."""
    return address.removeprefix("grpc://")
