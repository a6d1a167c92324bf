"""Dialling: who answers, and what happens when nobody or somebody else does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.events import Action, Event, FromWorker, Tick
from coordinator.workers import dial
from pdserve.core.channel import Channel, listen
from pdserve.core.errors import ConfigError, FingerprintMismatch, ModelNotFound, ProtocolError, WorkerLost
from pdserve.core.layout import PROTOCOL_VERSION, Fingerprint
from pdserve.core.messages import Drain, Hello, Message, Role
from tests.support.deployment import Deployed, deployed, scenario
from tests.support.model_workers import FINGERPRINT, worker_info


@scenario
async def test_nobody_at_an_address_is_a_lost_worker(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match=r"nobody\.sock"):
        await dial(f"unix:{tmp_path}/nobody.sock", sender="test")


@contextlib.asynccontextmanager
async def answering(folder: Path, *messages: Message) -> AsyncIterator[str]:
    """Somebody who says this to everyone who calls, and then listens; yields the address."""
    ended = asyncio.Event()

    async def converse(channel: Channel) -> None:
        channel.send(messages)
        while await channel.receive() is not None:
            pass
        await channel.close()
        ended.set()

    server, address = await listen(f"unix:{folder}/somebody.sock", converse)
    yield address
    await ended.wait()
    server.close()


@scenario
async def test_somebody_who_does_not_introduce_himself_in_time_is_left(tmp_path: Path) -> None:
    async with answering(tmp_path) as address:
        with pytest.raises(WorkerLost, match=r"no introduction within 0\.1 s"):
            await dial(address, sender="test", timeout_s=0.1)


@scenario
async def test_a_dial_that_is_cancelled_hangs_up(tmp_path: Path) -> None:
    called, hung_up = asyncio.Event(), asyncio.Event()

    async def converse(channel: Channel) -> None:
        called.set()
        while await channel.receive() is not None:
            pass
        hung_up.set()
        await channel.close()

    server, address = await listen(f"unix:{tmp_path}/silent.sock", converse)
    dialling = asyncio.create_task(dial(address, sender="test"))
    await called.wait()
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling
    await hung_up.wait()
    server.close()


@scenario
async def test_another_protocol_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    hello = Hello(protocol=99, sender="w")
    async with answering(tmp_path, hello, worker_info("w", Role.DECODE)) as address:
        with pytest.raises(ProtocolError, match=f"speaks protocol 99, this process {PROTOCOL_VERSION}"):
            await dial(address, sender="test")


@scenario
async def test_somebody_who_is_no_worker_is_refused(tmp_path: Path) -> None:
    async with answering(tmp_path, Hello(protocol=PROTOCOL_VERSION, sender="w"), Drain()) as address:
        with pytest.raises(ProtocolError, match="did not introduce itself"):
            await dial(address, sender="test")


@scenario
async def test_a_worker_of_another_model_is_refused_before_it_meets_its_peers(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=1, decode=0) as system:
        worker = await system.cluster.start("decode-0", Role.DECODE)
        other = Fingerprint(protocol=1, model="other", layouts=FINGERPRINT.layouts)
        worker.info = replace(worker.info, fingerprint=other)
        with pytest.raises(FingerprintMismatch, match="model='scripted'"):
            await system.coordinator.add_worker(worker.address)
        assert [w.id for w in system.coordinator.snapshot().workers] == ["prefill-0"]


@scenario
async def test_a_worker_can_be_added_only_to_a_model_that_is_served(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=0, decode=0) as system:
        worker = await system.cluster.start("decode-0", Role.DECODE)
        with pytest.raises(ModelNotFound):
            await system.coordinator.add_worker(worker.address, model="other")
        info = await system.coordinator.add_worker(worker.address, model="scripted")
        assert info == worker.info


@scenario
async def test_a_worker_that_sends_nonsense_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=2) as system:
        nonsense = system.worker("decode-0")
        nonsense.say([Drain()])
        await nonsense.disconnected.wait()
        completion = await system.client.generate("hello", max_tokens=3)
        assert completion.timings.decode_worker == "decode-1"


def failing_once(system: Deployed, kind: type[Event]) -> asyncio.Event:
    """The next event of that kind meets a bug of ours; set when it has."""
    registry, met = system.coordinator._require_running().dispatcher.registry, asyncio.Event()
    handle = registry.handle

    def handle_or_fail(event: Event, now: float) -> list[Action]:
        if isinstance(event, kind) and not met.is_set():
            met.set()
            raise KeyError("a bug of ours")
        return handle(event, now)

    registry.handle = handle_or_fail  # type: ignore[method-assign]  # for one event
    return met


@scenario
async def test_a_worker_whose_message_meets_a_bug_is_dialled_again_and_its_requests_go_on(
    tmp_path: Path,
) -> None:
    async with deployed(tmp_path) as system:
        met = failing_once(system, FromWorker)
        completion = await system.client.generate("hello", max_tokens=3)
        assert met.is_set()
        assert completion.usage.completion_tokens == 3


@scenario
async def test_a_bug_in_a_tick_does_not_stop_the_clock(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        met = failing_once(system, Tick)
        await met.wait()
        dispatcher = system.coordinator._require_running().dispatcher
        await dispatcher.ticked()
        await dispatcher.ticked()
        assert len(told) == 1


@scenario
async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        port = int(system.address.rpartition(":")[2])
        wanted = rf"coordinator\.port: cannot listen on 127\.0\.0\.1:{port}"
        with pytest.raises(ConfigError, match=wanted):
            async with deployed(tmp_path / "second", port=port):
                pass
