"""Workers of `model_workers` behind real channels, in the test's own event loop. Writes land at once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pdserve.core.channel import Channel, listen
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import Hello, Message, Role
from tests.support.model_workers import ModelDecode, ModelPrefill, worker_info

HEARTBEAT_S = 0.05


class ScriptedWorker:
    """One worker. `steps` bounds how far it computes; None is no bound. `mute` is SIGSTOP, `kill` SIGKILL."""

    def __init__(self, name: str, role: Role, hub: ScriptedCluster, **info: int) -> None:
        self.info = worker_info(name, role, **info)  # type: ignore[arg-type]  # forwarded
        self.model = ModelDecode(self.info) if role is Role.DECODE else ModelPrefill(self.info)
        self.steps: int | None = None
        self.heard: list[Message] = []
        self.hub = hub
        self.address = ""
        self._muted = False
        self._step_age_s = 0.0
        self._channel: Channel | None = None
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self.disconnected = asyncio.Event()
        """The coordinator has closed the connection."""

    async def start(self, folder: Path) -> None:
        path = folder / f"{self.info.worker}-{self.info.epoch}.sock"
        self._server, self.address = await listen(f"unix:{path}", self._converse)
        self._tasks = [asyncio.create_task(self._compute()), asyncio.create_task(self._beat())]

    async def kill(self) -> None:
        """The connection ends; nothing more is said or written."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            self._channel.abort()
        if self._server is not None:
            self._server.close()
        self.hub.workers.pop(self.info.worker, None)

    def cut(self) -> None:
        """The connection breaks; the process lives and listens."""
        assert self._channel is not None
        self._channel.abort()
        self.model.connection_lost()

    def hang(self, seconds: float) -> None:
        """It beats on, but its step lasts."""
        self._step_age_s = seconds

    def mute(self) -> None:
        """Neither heartbeats nor answers, but the connection stays."""
        self._muted = True

    def allow(self, steps: int | None) -> None:
        self.steps = steps
        self._wake.set()

    async def until(self, kind: type) -> Message:
        """The first message of a kind that it has heard, or hears next."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: any(isinstance(m, kind) for m in self.heard))
        return next(m for m in self.heard if isinstance(m, kind))

    async def until_idle(self) -> None:
        """Everything that was reserved or read here has been given back."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: not self._held())

    def _held(self) -> bool:
        model = self.model
        return bool(model.reservations if isinstance(model, ModelDecode) else model.readings)

    async def _converse(self, channel: Channel) -> None:
        self._channel = channel
        channel.send([Hello(protocol=PROTOCOL_VERSION, sender=self.info.worker)])
        first = await channel.receive()
        assert first is not None
        assert isinstance(first[0], Hello)
        channel.send([self.info, self.model.heartbeat()])
        while (batch := await channel.receive()) is not None:
            if self._muted:
                continue
            for message in batch:
                self.heard.append(message)
                self.say(self.model.handle(message))  # type: ignore[arg-type]  # whatever comes, it judges
            await self.changed()
        self.disconnected.set()
        await channel.close()

    def say(self, messages: Sequence[Message]) -> None:
        if messages and self._channel is not None and not self._muted:
            self._channel.send(messages)

    async def changed(self) -> None:
        self._wake.set()
        async with self._changed:
            self._changed.notify_all()
        async with self.hub.moved:
            self.hub.moved.notify_all()

    async def _compute(self) -> None:
        while True:
            self._wake.clear()
            while not self._muted and self._step():
                if self.steps is not None:
                    self.steps -= 1
                await self.changed()
                await asyncio.sleep(0)
            await self._wake.wait()

    def _step(self) -> bool:
        if self.steps == 0:
            return False
        model = self.model
        if isinstance(model, ModelDecode):
            busy = model.busy or bool(model.pushes)
            self.say(model.step())
            for push in model.pushes:
                self.hub.land(push.decode, push.attempt, push.first_token, push.before)
                self.say(model.move_landed(push.attempt))
            model.pushes.clear()
            return busy
        busy = bool(model.readings)
        for attempt in list(model.readings):
            self.say(model.step(attempt, landed=True))
        for push in model.pushes:
            self.hub.land(push.decode, push.attempt, push.first_token)
        model.pushes.clear()
        return busy

    async def _beat(self) -> None:
        while True:
            if not self._muted:
                beat = dataclasses.replace(self.model.heartbeat(), step_age_s=self._step_age_s)
                self.say([beat])
            await asyncio.sleep(HEARTBEAT_S)


class ScriptedCluster:
    """Workers that reach each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: dict[WorkerId, ScriptedWorker] = {}
        self.moved = asyncio.Condition()
        self._landing: set[asyncio.Task[None]] = set()

    async def start(self, name: str, role: Role, **info: int) -> ScriptedWorker:
        worker = ScriptedWorker(name, role, self, **info)
        await worker.start(self.folder)
        self.workers[worker.info.worker] = worker
        return worker

    def land(
        self, decode: WorkerId, attempt: AttemptId, first_token: int, before: Sequence[int] = ()
    ) -> None:
        worker = self.workers.get(decode)
        if worker is None:
            return
        assert isinstance(worker.model, ModelDecode)
        worker.say(worker.model.push_landed(attempt, first_token, before))
        task = asyncio.get_running_loop().create_task(worker.changed())
        self._landing.add(task)
        task.add_done_callback(self._landing.discard)

    async def stop(self) -> None:
        for worker in list(self.workers.values()):
            with contextlib.suppress(ConnectionError):
                await worker.kill()

    async def who_hears(self, kind: type) -> ScriptedWorker:
        """The first worker that is told something of this kind."""

        def listeners() -> list[ScriptedWorker]:
            return [w for w in self.workers.values() if any(isinstance(m, kind) for m in w.heard)]

        async with asyncio.timeout(10), self.moved:
            await self.moved.wait_for(listeners)
        return listeners()[0]

    def heard(self, kind: type) -> list[Message]:
        return [m for worker in self.workers.values() for m in worker.heard if isinstance(m, kind)]
