"""`pdserve health`: what a container's own probe asks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdserve.cli.app import app
from pdserve.client.health import is_serving
from pdserve.core.errors import WorkerLost
from pdserve.core.messages import Role
from tests.support.deployment import deployed, scenario


@scenario
async def test_it_serves_once_a_decode_worker_is_there(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=0, decode=0) as system:

        def ask(*more: str) -> tuple[int, str]:
            done = CliRunner().invoke(app, ["health", "--address", system.address, *more])
            return done.exit_code, done.stdout.strip()

        assert await asyncio.to_thread(ask) == (1, "not serving")
        await system.add("decode-0", Role.DECODE)
        assert await asyncio.to_thread(ask) == (0, "serving")
        assert await asyncio.to_thread(ask, "--model", "scripted") == (0, "serving")
        assert await asyncio.to_thread(is_serving, system.address)


def test_nobody_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost):
        is_serving(f"unix:{tmp_path}/nobody", timeout_s=1.0)
