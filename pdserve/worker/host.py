"""The worker's side of the channel: an asyncio server in a thread of its own.

Coordinators dial in; each connection is an owner of the requests it starts. What they send goes to the
compute loop's inbox; what the compute loop posts goes out as one frame per connection and post. Heartbeats
are sent from here, so that a long step does not look like a dead worker.

A coordinator that reads too slowly gets fewer, larger frames; one that has stopped reading is disconnected,
which cancels its requests. Others do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import uvloop

from pdserve.core.channel import Channel, listen
from pdserve.core.errors import ProtocolError
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import Heartbeat, Hello, Message, WorkerInfo
from pdserve.worker.events import CoordinatorLost, FromCoordinator, OwnerId
from pdserve.worker.journal import Journal

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 1.0
MAX_PENDING_MESSAGES: Final = 100_000
"""A coordinator this far behind has stopped reading."""


class _Connection:
    """One coordinator: what waits to be sent, and the flag that wakes its writer."""

    def __init__(self, owner: OwnerId, channel: Channel) -> None:
        self.owner, self.channel = owner, channel
        self.pending: list[Message] = []
        self.wake = asyncio.Event()

    def post(self, batch: Sequence[Message]) -> None:
        if len(self.pending) > MAX_PENDING_MESSAGES:
            raise ProtocolError(f"coordinator left {len(self.pending)} messages unread")
        self.pending.extend(batch)
        self.wake.set()

    async def write(self) -> None:
        """Send what is pending, as one frame, whenever the peer has taken the last one."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            batch, self.pending = self.pending, []
            self.channel.send(batch)
            await self.channel.drain()


class WorkerHost:
    """`start` and `stop` from the worker's main thread, `post` from the compute thread."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        on_event: Callable[[FromCoordinator | CoordinatorLost], None],
        heartbeat: Callable[[], Heartbeat],
        heartbeat_s: float,
        journal: Journal | None = None,
        alone_s: float | None = None,
        on_alone: Callable[[], None] = lambda: None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """on_alone: told once when no coordinator has been connected for `alone_s`, after one was."""
        self._alone_s, self._on_alone, self._tls = alone_s, on_alone, tls
        self._info, self._on_event = info, on_event
        self._heartbeat, self._heartbeat_s = heartbeat, heartbeat_s
        self._journal = journal or Journal(enabled=False)
        self._connections: dict[OwnerId, _Connection] = {}
        self._next_owner = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self, address: str) -> str:
        """Listen; returns the real address. Raises OSError when the address cannot be had."""
        started: list[str | BaseException] = []
        ready = threading.Event()

        def run() -> None:
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(self._serve(address, started, ready))
            except BaseException as error:  # the thread's outermost frame: `start` or the log tells
                if not started:
                    started.append(error)
                else:
                    log.exception("the channel server of %s died", self._info.worker)
            finally:
                ready.set()

        self._thread = threading.Thread(target=run, name=f"{self._info.worker}-channel", daemon=True)
        self._thread.start()
        ready.wait()
        result = started[0]
        if isinstance(result, BaseException):
            raise result
        return result

    def post(self, batches: Mapping[OwnerId, Sequence[Message]]) -> None:
        """Send a batch to each owner; messages to one that is gone are dropped. Never blocks."""
        if batches and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop closed: the worker is stopping
                self._loop.call_soon_threadsafe(self._deliver, batches)

    @property
    def num_coordinators(self) -> int:
        """Connected now. From any thread."""
        return len(self._connections)

    def stop(self) -> None:
        """Close every connection and end the thread. Safe to call twice."""
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
        if self._thread is not None:
            self._thread.join()

    def _deliver(self, batches: Mapping[OwnerId, Sequence[Message]]) -> None:
        for owner, batch in batches.items():
            connection = self._connections.get(owner)
            if connection is not None:
                self._post_or_drop(connection, batch)
            for message in batch:
                self._journal.note(message)

    def _post_or_drop(self, connection: _Connection, batch: Sequence[Message]) -> None:
        try:
            connection.post(batch)
        except ProtocolError as error:
            log.error("%s drops a coordinator: %s", self._info.worker, error)
            connection.channel.abort()
            del self._connections[connection.owner]

    async def _serve(self, address: str, started: list[str | BaseException], ready: threading.Event) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        talking: set[asyncio.Task[None]] = set()
        closing: set[asyncio.Task[None]] = set()

        async def accept(channel: Channel) -> None:
            task = asyncio.current_task()
            assert task is not None
            talking.add(task)
            try:
                await self._converse(channel)
            except asyncio.CancelledError:
                pass  # stopping; the streams module of Python 3.11 would report it as an error
            finally:
                talking.discard(task)
                # A task of its own, so that stopping cannot cut it short.
                closer = asyncio.create_task(_close(channel))
                closing.add(closer)
                closer.add_done_callback(closing.discard)

        server, real = await listen(address, accept, tls=self._tls)
        beat = asyncio.create_task(self._beat())
        started.append(real)
        ready.set()
        try:
            await self._stopping.wait()
        finally:
            server.close()
            for task in (beat, *talking):
                task.cancel()
            await asyncio.gather(beat, *talking, return_exceptions=True)
            await asyncio.gather(*closing)

    async def _beat(self) -> None:
        clock, met = asyncio.get_running_loop().time, False
        accompanied = clock()
        while True:
            if self._connections:
                met, accompanied = True, clock()
            elif met and self._alone_s is not None and clock() - accompanied > self._alone_s:
                log.error("%s: no coordinator for %.0f s", self._info.worker, self._alone_s)
                met = False
                self._on_alone()
            beat = self._heartbeat()
            for connection in list(self._connections.values()):
                self._post_or_drop(connection, [beat])
            await asyncio.sleep(self._heartbeat_s)

    async def _converse(self, channel: Channel) -> None:
        """One connection, from hello to end. Its end is told to the compute loop, whatever the cause."""
        owner = OwnerId(self._next_owner)
        self._next_owner += 1
        connection = _Connection(owner, channel)
        writer = asyncio.create_task(connection.write())
        try:
            await self._greet(connection)
            self._connections[owner] = connection
            while (batch := await channel.receive()) is not None:
                for message in batch:
                    self._journal.note(message)
                    self._on_event(FromCoordinator(owner, message))
        except (ProtocolError, ConnectionError, TimeoutError) as error:
            log.error("%s closes a connection: %s", self._info.worker, error or type(error).__name__)
        finally:
            self._connections.pop(owner, None)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            channel.send(connection.pending)  # a worker's last words; a no-op where the peer has gone
            self._on_event(CoordinatorLost(owner))

    async def _greet(self, connection: _Connection) -> None:
        # At once, past the queue: a peer of another version learns ours before it is hung up on.
        connection.channel.send([Hello(protocol=PROTOCOL_VERSION, sender=str(self._info.worker))])
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            batch = await connection.channel.receive()
        match batch:
            case [Hello() as hello, *rest]:
                pass
            case _:
                raise ProtocolError("a peer that did not say hello first")
        if hello.protocol != PROTOCOL_VERSION:
            raise ProtocolError(f"{hello.sender} speaks protocol {hello.protocol}, not {PROTOCOL_VERSION}")
        connection.post([self._info, self._heartbeat()])
        self._on_event(FromCoordinator(connection.owner, hello))
        for message in rest:
            self._on_event(FromCoordinator(connection.owner, message))


async def _close(channel: Channel) -> None:
    """Let what is queued go out, unless the peer does not take it."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await channel.close()
    except TimeoutError:
        channel.abort()
        await channel.close()
