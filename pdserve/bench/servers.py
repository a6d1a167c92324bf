"""The servers of a run: those that are there, and pdserve services started for it, as a user starts them."""

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

from pdserve.bench.drivers import Driver, make_driver
from pdserve.bench.scenario import SystemSpec
from pdserve.bench.workload import ServerLimits
from pdserve.client import AsyncClient
from pdserve.core.errors import PdServeError, WorkerLost

START_TIMEOUT_S: Final = 300.0
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


@contextlib.asynccontextmanager
async def serving(spec: SystemSpec, log_dir: Path) -> AsyncIterator[Server]:
    """Connect to it, or start it and end it afterwards. Raises a `PdServeError` when it cannot be asked."""
    async with contextlib.AsyncExitStack() as stack:
        command: tuple[str, ...] = ()
        address, units = spec.address, spec.units
        if address is None:
            port = _free_port()
            command, address = serve_command(spec, port), f"127.0.0.1:{port}"
            process = await stack.enter_async_context(_process(command, log_dir / f"{spec.name}.log"))
            await _until_ready(address, process, log_dir / f"{spec.name}.log")
            units = units or float(len(os.sched_getaffinity(0)))
        driver = make_driver(spec, address)
        stack.push_async_callback(driver.close)
        limits = await driver.limits()
        yield Server(spec=spec, driver=driver, limits=limits, address=address, command=command, units=units)


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
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_GRACE_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _until_ready(address: str, process: asyncio.subprocess.Process, log: Path) -> None:
    ended = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(START_TIMEOUT_S), AsyncClient(address, timeout_s=5.0) as client:
            while not await _is_ready(client):
                # Nothing tells another process that workers have come up; its end is noticed at once.
                done, _ = await asyncio.wait([ended], timeout=_LOOK_EVERY_S)
                if done:
                    raise WorkerLost("pdserve serve", f"it ended with {ended.result()}: {_tail(log)}")
    except TimeoutError:
        said = _tail(log)
        raise WorkerLost("pdserve serve", f"not ready after {START_TIMEOUT_S:g} s: {said}") from None
    finally:
        ended.cancel()


async def _is_ready(client: AsyncClient) -> bool:
    try:
        return any(model.ready for model in await client.list_models())
    except PdServeError:
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    return " / ".join(line.strip() for line in lines) or "it said nothing"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
