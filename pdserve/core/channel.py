"""Frames over an asyncio stream: a 4-byte big-endian length, then the frame of `codec`.

Addresses are `unix:/path` or `tcp:host:port`. Writes are batched by the caller: one `send` is one frame and
one system call.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from pdserve.core.codec import decode_frame, encode_frame
from pdserve.core.errors import ProtocolError
from pdserve.core.messages import Message

MAX_FRAME_BYTES: Final = 256 * 1024 * 1024
DEAD_HOST_S: Final = 10.0
"""A TCP peer whose host has not confirmed anything for so long is gone: the kernel alone would try for a
quarter of an hour."""
_LENGTH: Final = struct.Struct(">I")


class Channel:
    """One connection; `receive` returns the messages of the next frame, or None at its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, batch: Sequence[Message]) -> None:
        """Queue one frame without blocking; `drain` applies back-pressure. A no-op once closed."""
        if batch and not self._writer.is_closing():
            data = encode_frame(batch)
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def drain(self) -> None:
        await self._writer.drain()

    async def receive(self) -> list[Message] | None:
        """Messages of the next frame; None when the peer closed or died. Raises `ProtocolError`."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"frame of {length} bytes, limit {MAX_FRAME_BYTES}")
            return decode_frame(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):  # also ETIMEDOUT and EHOSTUNREACH: its host is gone
            return None

    @property
    def queued_bytes(self) -> int:
        """Bytes written but not yet taken by the kernel."""
        return self._writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Drop the connection at once, with what is still queued: for a peer that has stopped reading."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):  # the peer may have gone first; TLS errors are OSErrors, too
            await self._writer.wait_closed()


async def connect(
    address: str, *, tls: ssl.SSLContext | None = None, dead_host_s: float = DEAD_HOST_S
) -> Channel:
    """Open a channel to `address`; OSError when nobody listens there.

    dead_host_s: after so many seconds without any sign of life of its host, the connection has ended.
    """
    kind, _, rest = address.partition(":")
    if kind == "unix":
        return Channel(*await asyncio.open_unix_connection(rest))
    host, port = _host_port(address, rest)
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    _bound_silence(writer, dead_host_s)
    return Channel(reader, writer)


async def listen(
    address: str,
    on_connect: Callable[[Channel], Awaitable[None]],
    *,
    tls: ssl.SSLContext | None = None,
    dead_host_s: float = DEAD_HOST_S,
) -> tuple[asyncio.Server, str]:
    """Serve channels at `address` (`tcp:host:0` picks a port); returns the server and its real address.

    dead_host_s: as of `connect`.
    """
    kind, _, rest = address.partition(":")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if kind == "tcp":
            _bound_silence(writer, dead_host_s)
        await on_connect(Channel(reader, writer))

    if kind == "unix":
        return await asyncio.start_unix_server(accept, rest), address
    host, port = _host_port(address, rest)
    server = await asyncio.start_server(accept, host, port, ssl=tls)
    return server, f"tcp:{host}:{server.sockets[0].getsockname()[1]}"


def _bound_silence(writer: asyncio.StreamWriter, seconds: float) -> None:
    """What is sent must be confirmed in that time, and a connection on which nothing is sent is probed."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(seconds / 2)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(seconds / 6)))


def _host_port(address: str, rest: str) -> tuple[str, int]:
    host, _, port = rest.rpartition(":")
    if not address.startswith("tcp:") or not host or not port.isdigit():
        raise ProtocolError(f"address {address!r} is neither unix:/path nor tcp:host:port")
    return host, int(port)
