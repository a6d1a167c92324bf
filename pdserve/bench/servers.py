"""The servers of a run: those that are there, and those started for it, as a user starts them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from pdserve.bench.asks import Driver
from pdserve.bench.drivers import make_driver
from pdserve.bench.scenario import SystemSpec
from pdserve.bench.workload import ServerLimits
from pdserve.client import Access
from pdserve.core.errors import ConfigError, PdServeError, WorkerLost

STOP_GRACE_S: Final = 40.0
_LOOK_EVERY_S: Final = 0.25
_TAIL_LINES: Final = 3


@dataclass(slots=True, kw_only=True)
class Server:
    """One system, ready to be asked."""

    spec: SystemSpec
    driver: Driver
    limits: ServerLimits
    address: str
    command: tuple[str, ...]
    """Empty when it was running already."""
    units: float | None
    """Cores or GPUs; None when nobody said."""
    process: asyncio.subprocess.Process | None = None

    def freeze(self) -> None:
        """Where the system wants it: no process of it runs until `thaw`."""
        if self.spec.freeze and self.process is not None:
            _signal_all(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.spec.freeze and self.process is not None:
            _signal_all(self.process.pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def serving(spec: SystemSpec, log_dir: Path, access: Access | None = None) -> AsyncIterator[Server]:
    """Connect to it, or start it and end it afterwards. Raises a `PdServeError` when it cannot be asked.

    access: key and certificates for gRPC servers that were running.
    """
    async with contextlib.AsyncExitStack() as stack:
        command, address, log = spec.command, spec.address, log_dir / f"{spec.name}.log"
        process = None
        if address is None:
            port = _free_port()
            command, address = serve_command(spec, port), f"127.0.0.1:{port}"
        if command:
            await _nobody_at(spec, address)
            process = await stack.enter_async_context(_process(command, log))
        driver = make_driver(spec, address, access)
        stack.push_async_callback(driver.close)
        if process is not None:
            await _until_ready(spec, driver, process, log)
        yield Server(
            spec=spec,
            driver=driver,
            limits=await driver.limits(),
            address=address,
            command=command,
            units=spec.units or (float(len(os.sched_getaffinity(0))) if process else None),
            process=process,
        )


async def _nobody_at(spec: SystemSpec, address: str) -> None:
    """Another server at the same port would be measured in its place."""
    target = address.rpartition("//")[2].split("/")[0]
    host, _, port = target.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host or "127.0.0.1", int(port))
    except (OSError, ValueError):
        return
    writer.close()
    raise ConfigError(f"system {spec.name}: a server is at {address} already; end it, or leave command out")


def serve_command(spec: SystemSpec, port: int) -> tuple[str, ...]:
    words = [sys.executable, "-m", "pdserve.cli", "serve", "--port", str(port), "--no-dashboard"]
    words += ["--prefill", str(spec.prefill), "--decode", str(spec.decode)]
    if spec.model is not None:
        words += ["--model", spec.model]
    for setting in spec.settings:
        words += ["--set", setting]
    return tuple(words)


@contextlib.asynccontextmanager
async def _process(command: tuple[str, ...], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; it is told to stop in its turn
        )
        try:
            yield process
        finally:
            await _stop(process)


async def _stop(process: asyncio.subprocess.Process) -> None:
    members = _members(process.pid)
    _signal_all(process.pid, signal.SIGCONT)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_GRACE_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    # What did not go with it; psutil knows a process from another that has its number later.
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def _members(pid: int) -> list[psutil.Process]:
    """The process and all below it, parents first."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_all(pid: int, number: signal.Signals) -> None:
    for member in _members(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


async def _until_ready(
    spec: SystemSpec, driver: Driver, process: asyncio.subprocess.Process, log: Path
) -> None:
    ended = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(spec.start_timeout_s):
            while not await _is_ready(driver):
                # Nothing tells another process that workers have come up; its end is noticed at once.
                done, _ = await asyncio.wait([ended], timeout=_LOOK_EVERY_S)
                if done:
                    raise WorkerLost(spec.name, f"it ended with {ended.result()}: {_tail(log)}")
    except TimeoutError:
        said = _tail(log)
        raise WorkerLost(spec.name, f"not ready after {spec.start_timeout_s:g} s: {said}") from None
    finally:
        ended.cancel()


async def _is_ready(driver: Driver) -> bool:
    try:
        return await driver.is_ready()
    except PdServeError:
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    return " / ".join(line.strip() for line in lines) or "it said nothing"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
