"""Who may have a local Ray, and when it ends; the keeper without a Ray."""

from __future__ import annotations

import asyncio
import functools
import glob
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pdserve.cluster.keeper import ANSWER, SOCKET, Answer, Ask, Declined, Keeper, KeeperSpec, KeptRay, Request
from pdserve.cluster.kept_ray import KeeperLink, claim
from pdserve.cluster.ray_session import RaySession
from pdserve.cluster.run_dir import RunDir
from pdserve.core.config import ClusterSettings

SCENARIO_S = 10.0


@asynccontextmanager
async def keeping(
    root: Path, *, linger_s: float = 60.0, port: int = 50051
) -> AsyncIterator[asyncio.Task[None]]:
    """A keeper at work; its task ends when the keeper does."""
    run_dir = RunDir.make(root)
    session = RaySession(
        local=True, run_dir=run_dir, log_dir=root, dashboard_url=None, node_id="n", address="127.0.0.1:1"
    )
    spec = KeeperSpec(
        settings=ClusterSettings(linger_s=linger_s, start_timeout_s=60),
        num_cpus=1,
        identity="mine",
        port=port,
        auth_token="secret",
    )
    ready = asyncio.Event()
    keeper = Keeper(spec, session)

    async def run() -> None:
        try:
            await keeper.run(ready.set)
        finally:
            for asker in keeper.until_ended:
                asker.close()

    task = asyncio.create_task(run())
    await ready.wait()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        run_dir.remove()


def scenario(body: Callable[[Path], Awaitable[None]]) -> Callable[[Path], None]:
    @functools.wraps(body)
    def run(tmp_path: Path) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SCENARIO_S):
                await body(tmp_path)

        asyncio.run(bounded())

    return run


async def take(root: Path, identity: str = "mine", port: int = 50051) -> KeeperLink | None:
    """As another process would: its sockets block."""
    return await asyncio.to_thread(claim, identity, port, root)


def let_go(link: KeeperLink | None) -> None:
    assert link is not None
    link.sock.close()


@scenario
async def test_a_ray_whose_holder_served_and_died_is_given_to_the_next_of_the_same_settings(
    tmp_path: Path,
) -> None:
    async with keeping(tmp_path):
        first = await take(tmp_path)
        assert first is not None
        assert not first.ray.adopted
        first.linger()
        let_go(first)
        second = await take(tmp_path)
        while second is None:  # the keeper has yet to see the first one go
            second = await take(tmp_path)
        assert second.ray.adopted
        assert (second.ray.address, second.ray.auth_token) == ("127.0.0.1:1", "secret")
        let_go(second)


@scenario
async def test_a_ray_that_is_held_is_given_to_nobody(tmp_path: Path) -> None:
    async with keeping(tmp_path) as task:
        holder = await take(tmp_path)
        assert await take(tmp_path) is None
        assert await take(tmp_path, identity="another") is None
        assert not task.done()
        let_go(holder)


@scenario
async def test_an_abandoned_ray_of_other_settings_is_left_alone_unless_its_port_is_wanted(
    tmp_path: Path,
) -> None:
    async with keeping(tmp_path) as task:
        assert await take(tmp_path, identity="another", port=50052) is None
        assert not task.done()
        assert await take(tmp_path, identity="another", port=50051) is None
        await task


@scenario
async def test_a_ray_ends_when_nobody_comes_back_in_time(tmp_path: Path) -> None:
    async with keeping(tmp_path, linger_s=0.05) as task:
        holder = await take(tmp_path)
        assert holder is not None
        holder.linger()
        let_go(holder)
        await task


@scenario
async def test_a_ray_ends_at_once_with_a_holder_that_never_served(tmp_path: Path) -> None:
    async with keeping(tmp_path) as task:
        let_go(await take(tmp_path))
        await task


@scenario
async def test_only_the_holder_may_end_a_ray_that_is_held(tmp_path: Path) -> None:
    async with keeping(tmp_path) as task:
        holder = await take(tmp_path)
        assert holder is not None
        reader, writer = await connected(tmp_path)
        writer.write(Request(ask=Ask.END).model_dump_json().encode() + b"\n")
        answer = await asked(reader, writer, Request(ask=Ask.CLAIM, identity="mine"))
        assert answer == Declined(same_port=False)
        assert not task.done()
        writer.close()
        await asyncio.to_thread(holder.end)
        await task


@scenario
async def test_a_line_that_is_no_request_closes_its_connection_and_nothing_else(tmp_path: Path) -> None:
    async with keeping(tmp_path) as task:
        reader, writer = await connected(tmp_path)
        writer.write(b"what?\n")
        assert await reader.read() == b""
        writer.close()
        link = await take(tmp_path)
        assert isinstance(link, KeeperLink)
        assert isinstance(link.ray, KeptRay)
        assert not task.done()
        let_go(link)


def test_a_directory_without_a_keeper_is_passed_over(tmp_path: Path) -> None:
    held = RunDir.make(tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(held.path / SOCKET))  # a killed keeper leaves the file
    assert claim("mine", 50051, tmp_path) is None
    held.remove()


async def connected(root: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    (path,) = glob.glob(f"{root}/pdserve-*/{SOCKET}")
    return await asyncio.open_unix_connection(path)


async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Request) -> Answer:

    writer.write(request.model_dump_json().encode() + b"\n")
    return ANSWER.validate_json(await reader.readline())


@pytest.mark.parametrize("port", [0, 50052])
def test_nothing_is_found_where_nothing_was_left(tmp_path: Path, port: int) -> None:
    assert claim("mine", port, tmp_path) is None
