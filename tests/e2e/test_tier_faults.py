"""A disk tier that is full, and whose files are damaged, below real workers that answer real prompts."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from pdserve.client import AsyncClient
from pdserve.core.messages import Heartbeat, Role
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.support.whole_cluster import greedy
from tests.support.worker_process import WorkerProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("mount") is None, reason="a disk of a few blocks needs root"
    ),
]

Oracle = tuple[Path, PreTrainedModel]
NUM_TOKENS = 8
POOL_BLOCKS = 20
"""Room for one of the prompts: what is asked again has been evicted."""
LENGTH = 256
DISK_BLOCKS = 64
"""Of each worker, about: a few prompts, fewer than are asked."""
BLOCK_BYTES = 16 * 4 * 2 * 2 * 8 * 4
"""Tokens, layers, K and V, heads, width, bytes of a number."""


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is full after a few blocks."""
    folder = tmp_path_factory.mktemp("small-disk")
    size = f"size={DISK_BLOCKS * 2 * BLOCK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Tiered:
    """Coordinator, prefill worker and decode worker, each with a disk tier, and what the last ones say."""

    def __init__(self, client: AsyncClient, coordinator: Coordinator, oracle: Oracle) -> None:
        self._client, self._coordinator, self._oracle = client, coordinator, oracle

    async def ask(self, seed: int) -> None:
        """Right, whatever the disk did."""
        prompt = prompt_of(LENGTH, seed)
        answer = await self._client.generate(
            prompt_token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
        )
        wanted = await asyncio.to_thread(greedy, self._oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert list(answer.token_ids) == wanted

    async def until(self, condition: Callable[[Heartbeat], bool]) -> None:
        """By the prefill worker's last heartbeat."""

        def met() -> bool:
            return any(
                worker.id == "prefill-0" and worker.heartbeat is not None and condition(worker.heartbeat)
                for worker in self._coordinator.snapshot().workers
            )

        deadline = time.monotonic() + 30
        while not met():
            assert time.monotonic() < deadline, self._coordinator.snapshot()
            await asyncio.sleep(0.05)

    async def every_block_back(self) -> None:
        await self.until(
            lambda beat: beat.blocks.conserved and beat.blocks.held == beat.blocks.quarantined == 0
        )


@asynccontextmanager
async def tiered(oracle: Oracle, folder: Path, disk: Path) -> AsyncIterator[Tiered]:
    config = config_of(
        oracle[0],
        model={"max_model_len": 320},
        cache={
            "num_blocks": POOL_BLOCKS,
            "disk_tier_gib": 0.1,  # far more than there is
            "disk_tier_path": str(disk),
        },
        coordinator={"local_prefill": "never"},
    )
    coordinator = Coordinator(config, [ServedModel.from_dir(oracle[0], name="tiny")])
    with ExitStack() as stack:
        workers = [
            stack.enter_context(WorkerProcess(role, oracle[0], folder / f"{role.value}.sock", config))
            for role in Role
        ]
        for worker in workers:
            await asyncio.to_thread(worker.until_ready)
        endpoints = await coordinator.start()
        try:
            for worker in workers:
                await coordinator.add_worker(worker.address)
            async with AsyncClient(endpoints.grpc, timeout_s=60) as client:
                yield Tiered(client, coordinator, oracle)
        finally:
            await coordinator.stop(0.0)


def damage(folder: Path) -> int:
    """Turn one byte of each file, in the middle of its KV; how many files."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size >= BLOCK_BYTES]
    for file in files:
        with file.open("r+b") as writing:
            writing.seek(file.stat().st_size // 2)
            byte = writing.read(1)
            writing.seek(-1, os.SEEK_CUR)
            writing.write(bytes([byte[0] ^ 0xFF]))
    return len(files)


def test_a_full_disk_and_damaged_files_cost_no_token(
    tiny_oracle: Oracle, tmp_path: Path, small_disk: Path
) -> None:
    async def play() -> None:
        async with tiered(tiny_oracle, tmp_path, small_disk) as system:
            for seed in [*range(6), *range(6)]:
                await system.ask(seed)
            await system.until(lambda beat: beat.tiers.io_errors > 0)
            await system.every_block_back()
            # Full is the bound from then on: new blocks replace old ones, and are found again.
            for seed in (100, 101, 102):
                await system.ask(seed)
            await system.every_block_back()
            assert damage(small_disk) > 0
            for seed in (101, 102, 100, 5):
                await system.ask(seed)
            await system.until(lambda beat: beat.tiers.corrupt_blocks > 0)
            await system.ask(200)
            await system.every_block_back()

    asyncio.run(play())
