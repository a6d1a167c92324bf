"""A process that owns a local Ray, so that Ray and the workers outlive a `pdserve serve` that is killed.

    serve --spawns--> keeper --owns--> raylet, GCS --> workers (detached actors)
      '---- one connection: its end without `End` means that serve died ---'

While nobody holds it, a keeper waits `linger_s` for the next `pdserve serve` of the same deployment and then
ends everything. If the keeper itself is killed, the kernel ends its Ray with it. It holds the lock of the
deployment's directory, where its socket is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from pdserve.cluster.ray_session import RaySession, close_session, open_session
from pdserve.cluster.run_dir import RunDir
from pdserve.core.config import ClusterSettings
from pdserve.core.errors import ConfigError

log = logging.getLogger(__name__)

SOCKET: Final = "keeper.sock"
_LOG: Final = "keeper.log"
_STOP_GRACE_S: Final = 5.0


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KeeperSpec(_Frozen):
    """What the first `pdserve serve` tells the keeper it spawns, on its standard input."""

    settings: ClusterSettings
    num_cpus: int
    identity: str
    """Which deployment: the next `pdserve serve` must have the same one to take over."""
    port: int
    """Of gRPC; 0: any."""
    auth_token: str | None


class KeptRay(_Frozen):
    """The Ray that a keeper owns."""

    kind: Literal["kept"] = "kept"
    keeper_pid: int
    run_dir: Path
    address: str
    dashboard_url: str | None
    log_dir: Path
    auth_token: str | None
    adopted: bool
    """Another `pdserve serve` had it before: workers may live."""


class Declined(_Frozen):
    """Not to be had: another deployment's, or held by another process."""

    kind: Literal["declined"] = "declined"
    same_port: bool
    """It is abandoned, and its clients use the port that is asked for."""


class Failed(_Frozen):
    kind: Literal["failed"] = "failed"
    why: str


class Ask(StrEnum):
    CLAIM = "claim"
    """Take it over."""
    LINGER = "linger"
    """The deployment serves: from now on it outlives its holder."""
    END = "end"
    """End Ray and yourself; the connection closes when nothing is left."""


class Request(_Frozen):
    ask: Ask
    identity: str = ""
    port: int = 0


Answer = KeptRay | Declined | Failed
ANSWER: Final[TypeAdapter[Answer]] = TypeAdapter(Answer)


class Keeper:
    """Who holds the Ray of `session`, and when it ends."""

    def __init__(self, spec: KeeperSpec, session: RaySession) -> None:
        self._spec, self._session = spec, session
        self._holder: asyncio.StreamWriter | None = None
        self._served = False
        """A deployment ran here: its workers are worth keeping."""
        self._timer: asyncio.TimerHandle | None = None
        self._over = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self.until_ended: list[socket.socket] = []
        """Close them when nothing is left: whoever asked for the end waits for that."""

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Serve claims until the end was asked for, or nobody came in time."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)
        self._wait_for_a_holder()
        server = await asyncio.start_unix_server(self._converse, self._session.run_dir.path / SOCKET)
        on_ready()
        try:
            await self._over.wait()
        finally:
            server.close()
            if self._timer is not None:
                self._timer.cancel()
            for writer in self._writers:
                writer.close()
            await asyncio.gather(*(w.wait_closed() for w in self._writers), return_exceptions=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                self._asked(Request.model_validate_json(line), writer)
        except (ConnectionError, ValueError) as error:
            log.warning("a connection to the keeper broke: %s", error)
        finally:
            if self._holder is writer:
                self._holder = None
                self._wait_for_a_holder()
            if not self._over.is_set():
                self._writers.discard(writer)
                writer.close()

    def _asked(self, request: Request, writer: asyncio.StreamWriter) -> None:
        holds = self._holder is writer
        match request.ask:
            case Ask.CLAIM:
                self._answer(writer, self._claim(request, writer))
            case Ask.LINGER if holds:
                self._served = True
            case Ask.END if holds or self._holder is None:
                end: socket.socket = writer.get_extra_info("socket")
                self.until_ended.append(socket.socket(fileno=os.dup(end.fileno())))
                self._over.set()
            case _:
                log.warning("a process that does not hold this Ray asked for its %s", request.ask)

    def _claim(self, request: Request, writer: asyncio.StreamWriter) -> Answer:
        if self._holder is not None or self._over.is_set():
            return Declined(same_port=False)
        if request.identity != self._spec.identity:
            return Declined(same_port=request.port == self._spec.port != 0)
        self._holder = writer
        if self._timer is not None:
            self._timer.cancel()
        return describe(self._spec, self._session, adopted=self._served)

    def _answer(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        writer.write(ANSWER.dump_json(answer) + b"\n")

    def _wait_for_a_holder(self) -> None:
        patience_s = self._spec.settings.linger_s if self._served else self._spec.settings.start_timeout_s
        if self._timer is not None and not self._served:
            patience_s = 0.0  # its holder died before it served: there is nothing to keep
        log.warning("nobody holds this Ray; it ends in %.0f s", patience_s)
        self._timer = asyncio.get_running_loop().call_later(patience_s, self._over.set)


def describe(spec: KeeperSpec, session: RaySession, *, adopted: bool) -> KeptRay:
    assert session.log_dir is not None
    return KeptRay(
        keeper_pid=os.getpid(),
        run_dir=session.run_dir.path,
        address=session.address,
        dashboard_url=session.dashboard_url,
        log_dir=session.log_dir,
        auth_token=spec.auth_token,
        adopted=adopted,
    )


def main() -> None:
    """Read a `KeeperSpec` from standard input, start Ray, answer with a `KeptRay` or `Failed`, keep it."""
    spec = KeeperSpec.model_validate_json(sys.stdin.readline())
    try:
        session = open_session(spec.settings, num_cpus=spec.num_cpus)
    except ConfigError as error:
        _say(Failed(why=str(error)))
        return
    _log_into(session.run_dir)

    def ready() -> None:
        _say(describe(spec, session, adopted=False))
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    keeper = Keeper(spec, session)
    try:
        asyncio.run(keeper.run(ready))
    finally:
        close_session(session, grace_s=_STOP_GRACE_S)
        for asker in keeper.until_ended:
            asker.close()


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(ANSWER.dump_json(answer) + b"\n")
    sys.stdout.buffer.flush()


def _log_into(run_dir: RunDir) -> None:
    """Our standard error may be a terminal or a pipe that should end with the process that has it."""
    os.dup2(os.open(run_dir.path / _LOG, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


if __name__ == "__main__":
    main()
