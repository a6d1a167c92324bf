"""The channel server of a worker, without a worker behind it."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from pdserve.core.channel import Channel, connect
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import Cancel, Drain, Heartbeat, Hello, Message, Role, Tokens, WorkerInfo
from pdserve.core.worker_state import BlockCounts
from pdserve.worker import host as host_module
from pdserve.worker.events import CoordinatorLost, FromCoordinator, OwnerId
from pdserve.worker.host import WorkerHost
from tests.support.token_engine import TokenEngine

HELLO = Hello(protocol=PROTOCOL_VERSION, sender="test")
ATTEMPT = AttemptId(RequestId("r"), 0)
Events = queue.SimpleQueue[FromCoordinator | CoordinatorLost]


def beat() -> Heartbeat:
    return Heartbeat(
        worker=WorkerId("w"),
        epoch=1,
        blocks=BlockCounts(total=1, free=1, held=0, cached=0, quarantined=0),
        waiting=0,
        running=0,
        waiting_tokens=0,
        step_s=0.0,
        tokens_per_s=0.0,
        prefix_hit_tokens=0,
        prefix_query_tokens=0,
        steps=0,
    )


@contextmanager
def serving(folder: Path, heartbeat_s: float = 60.0) -> Iterator[tuple[WorkerHost, str, Events]]:
    events: Events = queue.SimpleQueue()
    info = WorkerInfo(
        worker=WorkerId("w"),
        role=Role.DECODE,
        epoch=1,
        pid=1,
        host="h",
        fingerprint=TokenEngine().fingerprint,
        transfer_metadata=b"",
        num_blocks=1,
        block_tokens=4,
        max_model_len=4,
        max_num_seqs=1,
    )
    host = WorkerHost(info=info, on_event=events.put, heartbeat=beat, heartbeat_s=heartbeat_s)
    address = host.start(f"unix:{folder}/w.sock")
    try:
        yield host, address, events
    finally:
        host.stop()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Channel]:
    channel = await connect(address)
    try:
        yield channel
    finally:
        channel.abort()
        await channel.close()


@asynccontextmanager
async def greeted(address: str) -> AsyncIterator[Channel]:
    async with connected(address) as channel:
        channel.send([HELLO])
        heard: list[Message] = []
        while len(heard) < 3:
            heard += await receive(channel)
        assert [type(message) for message in heard] == [Hello, WorkerInfo, Heartbeat]
        yield channel


async def receive(channel: Channel) -> list[Message]:
    async with asyncio.timeout(5.0):
        batch = await channel.receive()
    assert batch is not None, "the worker hung up"
    return batch


async def next_event(events: Events) -> FromCoordinator | CoordinatorLost:
    """The next one after greetings."""
    while True:
        event = await asyncio.to_thread(events.get, True, 5.0)
        if not (isinstance(event, FromCoordinator) and isinstance(event.message, Hello)):
            return event


def tokens(index: int, count: int = 1) -> Tokens:
    return Tokens(attempt=ATTEMPT, first_index=index, tokens=[7] * count)


def test_a_greeting_is_an_event_that_can_be_answered(tmp_path: Path) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with greeted(address) as channel:
            event = await asyncio.to_thread(events.get, True, 5.0)
            assert event == FromCoordinator(OwnerId(0), HELLO)
            host.post({event.owner: [tokens(0)]})
            assert await receive(channel) == [tokens(0)]

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))


def test_messages_go_both_ways_and_the_end_of_a_connection_is_an_event(tmp_path: Path) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with greeted(address) as channel:
            channel.send([Drain(), Cancel(attempt=ATTEMPT, reason="")])
            first, second = await next_event(events), await next_event(events)
            assert isinstance(first, FromCoordinator)
            assert first.message == Drain()
            assert isinstance(second, FromCoordinator)
            host.post({first.owner: [tokens(0), tokens(1)]})
            assert await receive(channel) == [tokens(0), tokens(1)]
        assert await next_event(events) == CoordinatorLost(first.owner)
        host.post({first.owner: [tokens(2)]})

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))


@pytest.mark.parametrize("opening", [Hello(protocol=99, sender="old"), Drain()])
def test_a_peer_that_does_not_greet_properly_is_hung_up_on(tmp_path: Path, opening: Message) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with connected(address) as stranger:
            stranger.send([opening])
            assert isinstance((await receive(stranger))[0], Hello)
            async with asyncio.timeout(5.0):
                assert await stranger.receive() is None
        assert isinstance(await next_event(events), CoordinatorLost)
        async with greeted(address):
            pass

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))


def test_garbage_on_a_connection_ends_that_connection_alone(tmp_path: Path) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with greeted(address) as good:
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
            writer.write(b"\x00\x00\x00\x03abc")
            async with asyncio.timeout(5.0):
                await reader.read()
            writer.close()
            await writer.wait_closed()
            host.post({OwnerId(0): [tokens(0)]})
            assert await receive(good) == [tokens(0)]

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))


def test_a_coordinator_that_reads_late_gets_everything_in_order_in_few_frames(tmp_path: Path) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with greeted(address) as channel:
            for index in range(300):
                host.post({OwnerId(0): [tokens(index, count=5000)]})
            frames: list[list[Message]] = []
            while sum(map(len, frames)) < 300:
                frames.append(await receive(channel))
            got = [m.first_index for frame in frames for m in frame if isinstance(m, Tokens)]
            assert got == list(range(300))
            assert len(frames) < 300

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))


def test_a_coordinator_that_stopped_reading_is_dropped_and_others_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "MAX_PENDING_MESSAGES", 50)

    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with greeted(address) as stuck, greeted(address) as alive:
            stuck._reader._transport.pause_reading()  # type: ignore[attr-defined]
            for index in range(100):
                host.post({OwnerId(0): [tokens(index, count=20_000)] * 5, OwnerId(1): [tokens(index)]})
                assert await receive(alive) == [tokens(index)]
            assert await next_event(events) == CoordinatorLost(OwnerId(0))
            host.post({OwnerId(1): [tokens(100)]})
            assert await receive(alive) == [tokens(100)]

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))


def test_heartbeats_come_by_themselves(tmp_path: Path) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with connected(address) as channel:
            channel.send([HELLO])
            heard: list[Message] = []
            while heard.count(beat()) < 4:
                heard += await receive(channel)

    with serving(tmp_path, heartbeat_s=0.02) as parts:
        asyncio.run(scenario(*parts))


def test_an_address_that_cannot_be_had_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), serving(tmp_path / "missing"):
        pass


def test_stopping_hangs_up_on_everybody(tmp_path: Path) -> None:
    async def scenario(host: WorkerHost, address: str, events: Events) -> None:
        async with greeted(address) as channel:
            await asyncio.to_thread(host.stop)
            async with asyncio.timeout(5.0):
                assert await channel.receive() is None

    with serving(tmp_path) as parts:
        asyncio.run(scenario(*parts))
