"""Frames over a real socket: whole, in order, and an end that is seen."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from pdserve.core.channel import Channel, connect, listen
from pdserve.core.errors import ProtocolError
from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.messages import Hello, Message, Tokens


def _tokens(index: int, count: int = 1) -> Message:
    return Tokens(attempt=AttemptId(RequestId("r"), 0), first_index=index, tokens=list(range(count)))


async def _pair(address: str) -> tuple[asyncio.Server, Channel, Channel]:
    accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()

    async def on_connect(channel: Channel) -> None:
        accepted.set_result(channel)

    server, real = await listen(address, on_connect)
    client = await connect(real)
    return server, client, await accepted


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_batches_arrive_whole_and_in_order(kind: str, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}" if kind == "unix" else "tcp:127.0.0.1:0"

    async def run() -> None:
        server, client, worker = await _pair(address)
        sent = [[_tokens(i, count=5000), _tokens(i + 1)] for i in range(50)]
        for batch in sent:
            client.send(batch)
        received = [await worker.receive() for _ in sent]
        assert received == sent
        await client.close()
        assert await worker.receive() is None
        await worker.close()
        server.close()

    asyncio.run(run())


def test_an_empty_batch_sends_nothing_and_a_closed_channel_swallows_sends() -> None:
    async def run() -> None:
        server, client, worker = await _pair("tcp:127.0.0.1:0")
        client.send([])
        client.send([Hello(protocol=1, sender="a")])
        assert await worker.receive() == [Hello(protocol=1, sender="a")]
        await client.close()
        client.send([Hello(protocol=1, sender="b")])
        await worker.close()
        server.close()

    asyncio.run(run())


def test_a_peer_that_speaks_something_else_is_a_protocol_error() -> None:
    async def run() -> None:
        accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()

        async def on_connect(channel: Channel) -> None:
            accepted.set_result(channel)

        server, real = await listen("tcp:127.0.0.1:0", on_connect)
        host, port = real.removeprefix("tcp:").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        worker = await accepted
        with pytest.raises(ProtocolError, match="limit"):
            await worker.receive()
        writer.close()
        await worker.close()
        server.close()

    asyncio.run(run())


def test_a_peer_whose_host_is_gone_has_ended() -> None:
    """What the kernel says once nothing has been confirmed for too long: ETIMEDOUT, EHOSTUNREACH."""

    async def run(error: OSError) -> None:
        server, client, worker = await _pair("tcp:127.0.0.1:0")
        worker._reader.set_exception(error)
        assert await worker.receive() is None
        await client.close()
        await worker.close()
        server.close()

    for number in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
        asyncio.run(run(OSError(number, "gone")))


@pytest.mark.parametrize("address", ["", "http:x", "tcp:nohost", "tcp:h:port"])
def test_a_malformed_address_is_named_in_the_error(address: str) -> None:
    with pytest.raises(ProtocolError, match="neither unix"):
        asyncio.run(connect(address))
