"""Draining over gRPC, connections that are made again, and workers that hang, over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pdserve.client.admin import DrainStatus, drain, undrain
from pdserve.core.errors import InvalidRequest
from pdserve.core.messages import Role, StartDecode, StartPrefill
from tests.support.deployment import Deployed, deployed, scenario
from tests.support.model_workers import continuation

PROMPT = [ord(c) for c in "a prompt"]


async def drained(system: Deployed, worker: str) -> list[DrainStatus]:
    async with asyncio.timeout(10):
        return await asyncio.to_thread(lambda: list(drain(system.address, worker, timeout_s=5.0)))


@scenario
async def test_a_drain_moves_the_stream_and_tells_when_nothing_is_left(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        source = system.worker("decode-0")
        source.allow(3)
        call = asyncio.create_task(system.client.generate(prompt_token_ids=PROMPT, max_tokens=20))
        await source.until(StartDecode)
        target = await system.add("decode-1", Role.DECODE)
        emptied = asyncio.create_task(drained(system, "decode-0"))
        await asyncio.sleep(0)
        source.allow(None)
        completion = await call
        assert completion.token_ids == tuple(continuation(PROMPT, 20))
        assert completion.timings.attempts == 1
        statuses = await emptied
        assert statuses[-1] == DrainStatus(requests_left=0, drained=True)
        again = await system.client.generate(prompt_token_ids=PROMPT, max_tokens=3)
        assert again.timings.decode_worker == target.info.worker


@scenario
async def test_a_drained_prefill_worker_gets_no_more_prompts(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=2) as system:
        assert (await drained(system, "prefill-0"))[-1].drained
        for _ in range(4):
            completion = await system.client.generate(prompt_token_ids=PROMPT, max_tokens=2)
            assert completion.timings.prefill_worker == "prefill-1"
        assert not any(isinstance(m, StartPrefill) for m in system.worker("prefill-0").heard)


@scenario
async def test_an_undrained_worker_is_used_again(tmp_path: Path) -> None:
    async with deployed(tmp_path, prefill=2) as system:
        assert (await drained(system, "prefill-0"))[-1].drained
        await asyncio.to_thread(undrain, system.address, "prefill-0")
        used = set[str]()
        while "prefill-0" not in used:  # its heartbeat has to say so
            completion = await system.client.generate(prompt_token_ids=PROMPT, max_tokens=2)
            used.add(completion.timings.prefill_worker)
        with pytest.raises(InvalidRequest, match="decode-0, prefill-0"):
            await asyncio.to_thread(undrain, system.address, "decode-7")


@scenario
async def test_a_worker_that_is_not_there_cannot_be_drained(tmp_path: Path) -> None:
    async with deployed(tmp_path) as system:
        with pytest.raises(InvalidRequest, match="decode-0, prefill-0"):
            await drained(system, "decode-7")


@scenario
@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
async def test_a_broken_connection_is_made_again_and_requests_go_on(tmp_path: Path, name: str) -> None:
    async with deployed(tmp_path) as system:
        worker = system.worker(name)
        worker.allow(2)
        call = asyncio.create_task(system.client.generate(prompt_token_ids=PROMPT, max_tokens=20))
        await worker.until(StartDecode if name == "decode-0" else StartPrefill)
        worker.cut()
        worker.allow(None)
        completion = await call
        assert completion.token_ids == tuple(continuation(PROMPT, 20))
        assert completion.timings.attempts == 2
        assert all(entry.up for entry in system.coordinator.snapshot().workers)


@scenario
async def test_a_worker_that_hangs_while_it_beats_is_given_up(tmp_path: Path) -> None:
    async with deployed(tmp_path, decode=2, step_timeout_s=5.0) as system:
        for name in ("decode-0", "decode-1"):
            system.worker(name).allow(2)
        call = asyncio.create_task(system.client.generate(prompt_token_ids=PROMPT, max_tokens=20))
        victim = await system.cluster.who_hears(StartDecode)
        victim.hang(6.0)
        await victim.disconnected.wait()
        for worker in system.cluster.workers.values():
            worker.allow(None)
        completion = await call
        assert completion.token_ids == tuple(continuation(PROMPT, 20))
        snapshot = system.coordinator.snapshot().workers
        (given_up,) = [entry for entry in snapshot if entry.id == victim.info.worker]
        assert not given_up.up
        assert not given_up.redialling
