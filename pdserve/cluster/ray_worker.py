"""One incarnation of a worker, seen from the launcher: the Ray actors of its ranks, as one thing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import ray

from pdserve.cluster.ray_session import RaySession
from pdserve.cluster.start_times import READY
from pdserve.core import errors
from pdserve.core.errors import CheckpointError, ConfigError, PdServeError, WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.core.logs import is_said_in_passing
from pdserve.worker.hosting import NotStarted, Progress, Started, StartStep

log = logging.getLogger(__name__)

OnProgress = Callable[[WorkerId, Progress], None]

_KILL_WAIT_S: Final = 10.0
_LOG_TAIL_LINES: Final = 8
_RAY_WORDS: Final = 400
"""Characters of Ray's own account of a death."""


@dataclass(slots=True)
class RayWorker:
    """One incarnation of a worker, seen from the launcher."""

    worker: WorkerId
    actor: Any
    node: str
    session: RaySession
    epoch: int
    address: str = ""
    pid: int = 0
    pidfd: int | None = None
    """Only for a process on this machine: signals through it cannot hit a successor of the pid."""
    followers: tuple[RayWorker, ...] = ()
    """Its other ranks, where it has several: it lives as long as all of them."""
    _wait: Any = field(default=None)

    async def start(self, on_progress: OnProgress) -> None:
        """Run the `start` of every rank, reporting the first one's steps; afterwards `address` is set."""
        if not self.followers:
            await self._start(on_progress)
            return
        try:
            async with asyncio.TaskGroup() as ranks:
                ranks.create_task(self._start(on_progress))
                for follower in self.followers:
                    ranks.create_task(follower.start(_unseen))
        except* PdServeError as failures:
            raise failures.exceptions[0] from None

    async def _start(self, on_progress: OnProgress) -> None:
        on_progress(self.worker, Progress(fraction=0.0, text="starting its process"))
        async for step in self._steps():
            match step:
                case Progress():
                    on_progress(self.worker, step)
                case NotStarted(error=error, message=message):
                    raise _typed(self.worker, error, message)
                case Started(address=address, pid=pid):
                    self.address, self.pid = address, pid
                    on_progress(self.worker, READY)
        self.watch(self.pid)
        self.follow()

    def watch(self, pid: int) -> None:
        """`pid` is its process, 0 when that is not known."""
        self.pid = pid
        if pid and self.node == self.session.node_id and hasattr(os, "pidfd_open"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended: Ray will say so
                self.pidfd = os.pidfd_open(pid)

    def follow(self) -> None:
        """Be told by Ray when the process, or the worker in it, ends."""
        self._wait = self.actor.wait.remote()

    async def died(self) -> str:
        """Why, when the first of its ranks has ended."""
        ranks = [asyncio.ensure_future(rank._died()) for rank in (self, *self.followers)]
        try:
            await asyncio.wait(ranks, return_when=asyncio.FIRST_COMPLETED)
            number, ended = next((number, rank) for number, rank in enumerate(ranks) if rank.done())
            return f"rank {number}: {ended.result()}" if number else ended.result()
        finally:
            for rank in ranks:
                rank.cancel()
            await asyncio.gather(*ranks, return_exceptions=True)

    async def _died(self) -> str:
        try:
            return str(await self._wait)
        except ray.exceptions.RayError as error:
            return self._explain(error)

    async def ping(self) -> None:
        await asyncio.gather(*(rank._ping() for rank in (self, *self.followers)))

    async def _ping(self) -> None:
        try:
            await self.actor.ping.remote()
        except ray.exceptions.RayError as error:
            raise WorkerLost(self.worker, self._explain(error)) from error

    async def retire(self, timeout_s: float | None) -> None:
        """Tell it to hand over what it runs and to end, within `timeout_s` (None: as configured)."""
        try:
            await self.actor.retire.remote(timeout_s)
        except ray.exceptions.RayError as error:
            log.warning("%s could not be told: %s", self.worker, first_line(error))

    async def stop(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self.actor.stop.remote()
                # Unlike a kill, this is an end that Ray does not report as a crash.
                self.actor.__ray_terminate__.remote()
                if self.pidfd is not None:
                    await _readable(self.pidfd)
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("%s did not stop in %.1f s: %s", self.worker, grace_s, first_line(error))
        for follower in self.followers:
            follower.actor.__ray_terminate__.remote()  # it ends by itself: its leader has stopped
        await self.kill()

    async def kill(self) -> None:
        await asyncio.gather(*(rank._kill() for rank in (self, *self.followers)))

    async def _kill(self) -> None:
        ray.kill(self.actor, no_restart=True)
        if self.pidfd is None:
            return
        pidfd, self.pidfd = self.pidfd, None
        try:
            # Ray asks the process to end itself; one that is stopped (SIGSTOP) would never hear.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            async with asyncio.timeout(_KILL_WAIT_S):
                await _readable(pidfd)
        except ProcessLookupError:
            pass
        except TimeoutError:
            log.error("%s: process %d survives SIGKILL", self.worker, self.pid)
        finally:
            os.close(pidfd)

    async def _steps(self) -> AsyncIterator[StartStep]:
        try:
            async for ref in self.actor.start.options(num_returns="streaming").remote():
                step: StartStep = await ref
                yield step
        except ray.exceptions.RayError as error:
            raise WorkerLost(self.worker, self._explain(error)) from error

    def _explain(self, error: BaseException) -> str:
        """One line of why, and the last lines the process wrote where they are on this machine."""
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = error.cause
            return f"{type(cause).__name__}: {cause}"
        why = f"process {self.pid or '(starting)'} ended"
        if "SIGKILL" in str(error) or "OOM" in str(error).partition("Some common causes")[0]:
            why += ", killed"
        if not self.pid:  # what Ray says of it is all there is
            return f"{why}: {' '.join(str(error).split())[:_RAY_WORDS]}"
        tail = _log_tail(self.session.log_dir, self.pid)
        return f"{why}; it last wrote:\n{tail}" if tail else f"{why} without a warning of its own"


def _typed(worker: WorkerId, error: str, message: str) -> PdServeError:
    """What a worker reported on its start, as the error that says what to change."""
    kind = getattr(errors, error, None)
    if isinstance(kind, type) and issubclass(kind, CheckpointError):
        return CheckpointError(message)
    if isinstance(kind, type) and issubclass(kind, ConfigError):
        return ConfigError(f"{worker}: {message}")
    return WorkerLost(worker, f"{error}: {message}")


def _log_tail(log_dir: Path | None, pid: int) -> str:
    if log_dir is None or not pid:
        return ""
    lines: list[str] = []
    for path in log_dir.glob(f"worker-*-{pid}.err"):
        lines += path.read_text(errors="replace").splitlines()
    # Ray's own marks begin with a colon.
    telling = [line for line in lines if not line.startswith(":") and not is_said_in_passing(line)]
    return "\n".join(telling[-_LOG_TAIL_LINES:])


async def _readable(fd: int) -> None:
    """Wait until `fd` is readable: for a pidfd, until its process has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unseen(worker: WorkerId, progress: Progress) -> None:
    """Followers load as their leader does."""
