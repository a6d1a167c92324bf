"""Ray says that a machine will be taken away: its workers are told to hand over, once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pdserve.cluster.ray_host import RayHost
from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId


@dataclass
class FakeWorker:
    node: str
    epoch: int = 1
    told: list[float | None] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def retire(self, timeout_s: float | None) -> None:
        self.told.append(timeout_s)
        self.heard.set()


def test_workers_of_a_node_that_goes_are_told_once_and_the_others_are_not() -> None:
    async def main() -> None:
        anything: Any = None
        host = RayHost(anything, anything, ServeConfig(), (), lambda worker, progress: None)
        going, staying = FakeWorker("a"), FakeWorker("b")
        cast(Any, host)._workers = {WorkerId("decode-0"): going, WorkerId("decode-1"): staying}
        looks = 0
        looked_twice = asyncio.Event()
        loop = asyncio.get_running_loop()

        def draining() -> Mapping[str, int]:
            nonlocal looks
            looks += 1
            if looks == 2:
                loop.call_soon_threadsafe(looked_twice.set)
            return {"a": int((time.time() + 30) * 1000)}

        watching = asyncio.create_task(host.watch_nodes(draining))
        async with asyncio.timeout(10):
            await going.heard.wait()
            await looked_twice.wait()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert staying.told == []
        (left_s,) = going.told
        assert left_s is not None
        assert 20 < left_s < 30

    asyncio.run(main())
