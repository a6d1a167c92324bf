"""Keeps every worker of a deployment alive: notices a death, tells the coordinator, starts a successor.

         launch                 add                       died | silent
    o ----------> starting ------------> serving ----------------------.
                     ^                                                  |
                     '---- back-off <---- removed from the coordinator <'

One task per worker. A worker is dead when its process ended, when its own loops failed (`WorkerHandle.died`
says so within milliseconds), when it answered no ping within a bound (a stopped process looks alive to
everyone but its clients), or when the coordinator gave it up. Its successor has the same name and the next
epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from pdserve.cluster.placement import WorkerSlot
from pdserve.core.errors import PdServeError, WorkerLost
from pdserve.core.ids import WorkerId

log = logging.getLogger(__name__)

_PINGS_PER_TIMEOUT: Final = 4


class WorkerHandle(Protocol):
    """One incarnation of a worker."""

    @property
    def address(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def epoch(self) -> int:
        """Of the process: one that was found running has the epoch it was started with."""
        ...

    async def died(self) -> str:
        """Complete, with the reason, when the process has ended or the worker's own loops have failed."""
        ...

    async def ping(self) -> None:
        """Return when the process answered."""
        ...

    async def retire(self, timeout_s: float | None) -> None:
        """Tell it to hand over what it runs and to end, within `timeout_s`; None: as configured."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Let the worker finish what it does, at most `grace_s`, then make sure that it is gone."""
        ...

    async def kill(self) -> None:
        """Make sure that the process is gone, now, even when it is stopped."""
        ...


class WorkerHost(Protocol):
    """Starts workers, or finds them running; raises `PdServeError` when one cannot start."""

    async def launch(self, slot: WorkerSlot, epoch: int) -> WorkerHandle: ...


class Registry(Protocol):
    """Who routes requests to workers: the coordinator."""

    async def add(self, address: str) -> None: ...

    async def remove(self, worker: WorkerId, why: str) -> None:
        """The process has ended for certain."""
        ...

    def is_up(self, worker: WorkerId) -> bool:
        """False: it gets no requests, though its process may live."""
        ...


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start: nothing after a long life, doubling in a crash loop."""

    first_s: float = 0.5
    limit_s: float = 30.0
    healthy_s: float = 60.0
    """A worker that served this long starts the count afresh."""
    failures: int = 0

    def after(self, lived_s: float) -> float:
        """Seconds to wait, given how long the last incarnation served (0: it never did)."""
        if lived_s >= self.healthy_s:
            self.failures = 0
        wait = 0.0 if self.failures == 0 else min(self.limit_s, self.first_s * 2 ** (self.failures - 1))
        self.failures += 1
        return wait


@dataclass(slots=True)
class _Watched:
    slot: WorkerSlot
    epoch: int = 0
    handle: WorkerHandle | None = None
    started: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)
    leaving: bool = False
    """Its end is wanted: it gets no successor."""
    task: asyncio.Task[None] | None = None


class Supervisor:
    """Starts the workers of `slots` on `host` and keeps them registered with `registry` until `stop`."""

    def __init__(
        self,
        host: WorkerHost,
        registry: Registry,
        slots: Sequence[WorkerSlot],
        *,
        ping_timeout_s: float,
        epochs_before: int = 0,
        backoff: Callable[[], Backoff] = Backoff,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """epochs_before: no incarnation before us had a higher one; processes that it met may live on."""
        self._host, self._registry = host, registry
        self._ping_timeout_s, self._sleep = ping_timeout_s, sleep
        self._epochs_before, self._backoff = epochs_before, backoff
        self._watched = [self._watch(slot) for slot in slots]

    async def start(self) -> None:
        """Start every worker at once; the first that cannot start fails the deployment, typed."""
        try:
            async with asyncio.TaskGroup() as group:
                for watched in self._watched:
                    group.create_task(self._launch(watched))
        except* PdServeError as failures:
            raise failures.exceptions[0] from None
        for watched in self._watched:
            self._supervise(watched)

    async def add(self, slot: WorkerSlot) -> None:
        """Start one more and keep it alive. Raises what its start does; nothing of it is left then."""
        watched = self._watch(slot)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._bury, watched, "it could not be put to use")
            await self._launch(watched)
            undo.pop_all()
        self._watched.append(watched)
        self._supervise(watched)

    async def retire(self, worker: WorkerId, timeout_s: float | None = None) -> None:
        """Have it hand over what it runs and end; returns when its process has ended. It gets no successor.

        timeout_s: as `WorkerHandle.retire` takes it. Unknown workers: nothing.
        """
        watched = next((w for w in self._watched if w.slot.worker == worker), None)
        if watched is None or watched.task is None:
            return
        watched.leaving = True
        if watched.handle is None:
            watched.task.cancel()  # it is dead, and waits to be started again
        else:
            await watched.handle.retire(timeout_s)
        await asyncio.wait({watched.task})
        if watched.handle is None:
            self._watched.remove(watched)

    def _watch(self, slot: WorkerSlot) -> _Watched:
        return _Watched(slot, epoch=self._epochs_before, backoff=self._backoff())

    def _supervise(self, watched: _Watched) -> None:
        watched.task = asyncio.create_task(self._keep_alive(watched), name=f"supervise-{watched.slot.worker}")

    async def stop(self, grace_s: float) -> None:
        """Stop watching, then stop every worker that lives."""
        tasks = [watched.task for watched in self._watched if watched.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handles = [watched.handle for watched in self._watched if watched.handle is not None]
        await asyncio.gather(*(handle.stop(grace_s) for handle in handles))

    def epochs(self) -> dict[WorkerId, int]:
        """The incarnation of each worker."""
        return {watched.slot.worker: watched.epoch for watched in self._watched}

    def pids(self) -> dict[WorkerId, int]:
        """The process of each worker that lives."""
        return {w.slot.worker: w.handle.pid for w in self._watched if w.handle is not None}

    async def _launch(self, watched: _Watched) -> None:
        watched.epoch += 1
        watched.handle = await self._host.launch(watched.slot, watched.epoch)
        watched.epoch = watched.handle.epoch
        await self._registry.add(watched.handle.address)
        watched.started = asyncio.get_running_loop().time()

    async def _keep_alive(self, watched: _Watched) -> None:
        while True:
            if watched.handle is not None:
                why = await self._until_dead(watched.slot.worker, watched.handle)
                lived_s = asyncio.get_running_loop().time() - watched.started
                await self._bury(watched, why)
            else:
                lived_s = 0.0
            if watched.leaving:
                return
            wait_s = watched.backoff.after(lived_s)
            if wait_s > 0:
                log.warning("%s starts again in %.1f s", watched.slot.worker, wait_s)
                await self._sleep(wait_s)
            try:
                await self._launch(watched)
            except (PdServeError, OSError) as error:
                log.error("%s (epoch %d) did not start: %s", watched.slot.worker, watched.epoch, error)
                if watched.handle is not None:
                    await self._bury(watched, str(error))
            else:
                log.warning("%s is back (epoch %d)", watched.slot.worker, watched.epoch)

    async def _bury(self, watched: _Watched, why: str) -> None:
        handle, watched.handle = watched.handle, None
        if handle is None:
            return
        level = logging.INFO if watched.leaving else logging.ERROR
        log.log(level, "%s (epoch %d) is dead: %s", watched.slot.worker, watched.epoch, why)
        # The process first: once the coordinator hears, it tells peers that nothing of it writes any more.
        await handle.kill()
        await self._registry.remove(watched.slot.worker, why)

    async def _until_dead(self, worker: WorkerId, handle: WorkerHandle) -> str:
        died = asyncio.ensure_future(handle.died())
        silent = asyncio.ensure_future(self._until_silent(worker, handle))
        try:
            await asyncio.wait((died, silent), return_when=asyncio.FIRST_COMPLETED)
            return (died if died.done() else silent).result()
        finally:
            for task in (died, silent):
                task.cancel()
            await asyncio.gather(died, silent, return_exceptions=True)

    async def _until_silent(self, worker: WorkerId, handle: WorkerHandle) -> str:
        while True:
            try:
                async with asyncio.timeout(self._ping_timeout_s):
                    await handle.ping()
            except TimeoutError:
                return f"no answer for {self._ping_timeout_s:g} s"
            except WorkerLost as error:
                return str(error)
            if not self._registry.is_up(worker):
                return "the coordinator gave it up"
            await asyncio.sleep(self._ping_timeout_s / _PINGS_PER_TIMEOUT)
