"""The coordinator's clock on the event loop that deployments run on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop

from coordinator.dispatcher import Dispatcher
from tests.support.deployment import deployed


def test_a_tick_that_is_due_at_once_does_not_stop_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # uvloop makes no timer of a call whose time has come, and its handle tells no time.
    ticked = asyncio.Event()
    due, calls = Dispatcher._next_tick, 0

    def at_once(self: Dispatcher) -> float:
        nonlocal calls
        calls += 1
        if calls > 5:
            ticked.set()
            return due(self)
        return 0.0

    async def main() -> list[dict[str, object]]:
        broken: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        monkeypatch.setattr(Dispatcher, "_next_tick", at_once)
        async with asyncio.timeout(20), deployed(tmp_path) as system:
            await ticked.wait()
            answer = await system.client.generate(prompt="hello", max_tokens=2)
            assert answer.token_ids
        return broken

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == []
