"""A coordinator with scripted workers and a client, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from pdserve.client import Access, AsyncClient
from pdserve.client.channel import OPEN_ACCESS
from pdserve.core.config import CoordinatorSettings, ServeConfig
from pdserve.core.messages import Role
from pdserve.core.security_settings import SecuritySettings
from tests.support.scripted_model import make_scripted_model
from tests.support.scripted_worker import ScriptedCluster, ScriptedWorker

P = ParamSpec("P")
SCENARIO_TIMEOUT_S = 30


def scenario(body: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a loop of its own; one that hangs fails."""

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(SCENARIO_TIMEOUT_S):
                await body(*args, **kwargs)

        asyncio.run(bounded())

    return run


@dataclass
class Deployed:
    coordinator: Coordinator
    cluster: ScriptedCluster
    client: AsyncClient
    address: str
    metrics_port: int
    console: str

    async def add(self, name: str, role: Role, **info: int) -> ScriptedWorker:
        worker = await self.cluster.start(name, role, **info)
        await self.coordinator.add_worker(worker.address)
        return worker

    def worker(self, name: str) -> ScriptedWorker:
        return next(w for n, w in self.cluster.workers.items() if n == name)


@contextlib.asynccontextmanager
async def deployed(
    folder: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    chat: bool = True,
    security: SecuritySettings | None = None,
    keys: str | None = None,
    access: Access = OPEN_ACCESS,
    **settings: Any,
) -> AsyncIterator[Deployed]:
    """`settings` are the coordinator's; ports are free ones, and the model is called `scripted`.

    access: the client's; keys: API keys from elsewhere than a file.
    """
    config = ServeConfig(
        coordinator=CoordinatorSettings(**{"port": 0, "whole_on_prefill": "never", **settings}),
        security=security or SecuritySettings(),
    )
    model = ServedModel.from_dir(make_scripted_model(folder / "model", chat=chat), name="scripted")
    coordinator = Coordinator(config, [model], keys=keys)
    cluster = ScriptedCluster(folder)
    try:
        endpoints = await coordinator.start()
        async with AsyncClient(endpoints.grpc, timeout_s=20, access=access) as client:
            system = Deployed(
                coordinator, cluster, client, endpoints.grpc, endpoints.metrics_port, endpoints.console or ""
            )
            for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
                for index in range(count):
                    await system.add(f"{role.value}-{index}", role)
            yield system
    finally:
        await coordinator.stop(0.0)
        await cluster.stop()
