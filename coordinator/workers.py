"""Connections to workers: the coordinator dials, both say hello, the worker introduces itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Final

from pdserve.core.channel import Channel, connect
from pdserve.core.errors import ProtocolError, WorkerLost
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import Down, Hello, Message, WorkerInfo
from pdserve.core.tls import RenewedContext

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 10.0
MAX_QUEUED_BYTES: Final = 256 * 2**20
"""A worker that leaves this much unread has stopped reading."""


async def dial(
    address: str, *, sender: str, tls: RenewedContext | None = None, timeout_s: float = DIAL_TIMEOUT_S
) -> tuple[Channel, WorkerInfo, list[Message]]:
    """Connect to a worker; returns what it sent after its introduction too.

    Raises `WorkerLost` when nobody answers in time, `ProtocolError` when somebody else does.
    """
    try:
        async with asyncio.timeout(timeout_s):
            channel = await connect(address, tls=None if tls is None else tls.latest())
            with contextlib.ExitStack() as unless_introduced:
                unless_introduced.callback(channel.abort)
                channel.send([Hello(protocol=PROTOCOL_VERSION, sender=sender)])
                info, rest = await _introduction(channel, address)
                unless_introduced.pop_all()
    except (OSError, TimeoutError) as error:
        raise WorkerLost(address, str(error) or f"no introduction within {timeout_s:g} s") from error
    return channel, info, rest


async def _introduction(channel: Channel, address: str) -> tuple[WorkerInfo, list[Message]]:
    seen: list[Message] = []
    while (batch := await channel.receive()) is not None:
        seen += batch
        match seen:
            case [Hello(protocol=theirs), *_] if theirs != PROTOCOL_VERSION:
                raise ProtocolError(f"{address} speaks protocol {theirs}, this process {PROTOCOL_VERSION}")
            case [Hello(), WorkerInfo() as info, *rest]:
                return info, rest
            case [Hello()]:
                continue
            case _:
                raise ProtocolError(f"{address} did not introduce itself as a worker")
    raise WorkerLost(address, "it closed the connection before it had introduced itself")


class WorkerLink:
    """One worker's connection. What is sent during one turn of the event loop goes out as one frame."""

    def __init__(
        self,
        channel: Channel,
        info: WorkerInfo,
        *,
        now: float,
        on_batch: Callable[[WorkerLink, Sequence[Message]], None],
        on_end: Callable[[WorkerLink, str], None],
    ) -> None:
        """on_end: told once, when the connection ends for any reason but `abort`."""
        self.info: Final = info
        self.last_heard = now
        self._channel = channel
        self._on_batch, self._on_end = on_batch, on_end
        self._outbox: list[Down] = []
        self._reader = asyncio.create_task(self._read(), name=f"link-{info.worker}")
        self._closed = False

    def send(self, message: Down) -> None:
        if self._closed:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def abort(self) -> None:
        """Drop the connection with what is queued on it. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._reader.cancel()
            self._channel.abort()

    async def close(self) -> None:
        """Send what is queued, then close."""
        self._flush()
        self._closed = True
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        try:
            async with asyncio.timeout(1.0):
                await self._channel.close()
        except TimeoutError:
            self._channel.abort()

    def _flush(self) -> None:
        batch, self._outbox = self._outbox, []
        if self._closed:
            return
        self._channel.send(batch)
        if self._channel.queued_bytes > MAX_QUEUED_BYTES:
            self._ended(f"it left {self._channel.queued_bytes} bytes unread")

    async def _read(self) -> None:
        why = "it closed the connection"
        loop = asyncio.get_running_loop()
        try:
            while (batch := await self._channel.receive()) is not None:
                self.last_heard = loop.time()
                self._on_batch(self, batch)
        except ProtocolError as error:
            why = str(error)
        except (
            Exception
        ) as error:  # a bug of ours: nobody would read on, and the worker would seem to be well
            log.exception("what %s sent could not be handled", self.info.worker)
            why = f"what it sent could not be handled: {error!r}"
        self._ended(why)

    def _ended(self, why: str) -> None:
        if not self._closed:
            self._closed = True
            self._channel.abort()
            if asyncio.current_task() is not self._reader:
                self._reader.cancel()
            self._on_end(self, why)
