"""A prefill and a decode worker in two network namespaces; the cable between them loses packets, or all."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from benchmarks.network_namespaces import ADDRESSES, DEVICE, available, two_namespaces, within
from coordinator.models import ServedModel
from coordinator.service import Coordinator
from pdserve.client import AsyncClient, Completion
from pdserve.core.errors import PdServeError
from pdserve.core.messages import Role
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.support.lossy_link import LossyLink
from tests.support.paths import REPO
from tests.support.whole_cluster import greedy
from tests.support.worker_process import WorkerProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not available() or shutil.which("tc") is None, reason="network namespaces need root, ip and tc"
    ),
]

Oracle = tuple[Path, PreTrainedModel]
DEADLINE_S = 3.0
NUM_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Divided:
    """A coordinator that reaches both workers, whatever happens to the cable between them."""

    client: AsyncClient
    coordinator: Coordinator
    oracle: Oracle
    links: tuple[LossyLink, LossyLink]

    def lose(self, share: float) -> None:
        for link in self.links:
            link.lose(share)

    @property
    def lost(self) -> int:
        return sum(link.lost for link in self.links)

    async def ask(self, length: int, seed: int) -> Completion | PdServeError:
        """The right answer, or a typed error."""
        prompt = prompt_of(length, seed)
        try:
            answer = await self.client.generate(
                prompt_token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
            )
        except PdServeError as error:
            if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS"):
                raise
            return error
        expected = await asyncio.to_thread(greedy, self.oracle[1], prompt, NUM_TOKENS, ignore_eos=True)
        assert list(answer.token_ids) == expected
        return answer

    async def until_every_block_is_back(self, timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                now = self.coordinator.snapshot()
                beats = [worker.heartbeat for worker in now.workers]
                if not (now.active or now.waiting or now.unsettled) and all(
                    beat is not None
                    and beat.blocks.conserved
                    and not beat.blocks.held + beat.blocks.quarantined
                    for beat in beats
                ):
                    return
                await asyncio.sleep(0.05)  # the next heartbeat tells


@asynccontextmanager
async def divided(oracle: Oracle, folder: Path) -> AsyncIterator[Divided]:
    ucx = {"TLS": "tcp", "NET_DEVICES": DEVICE}
    config = config_of(
        oracle[0],
        coordinator={"local_prefill": "never", "max_attempts": 3},
        transfer={"deadline_s": DEADLINE_S, "lease_s": DEADLINE_S, "ucx": ucx, "tcp_fallback": "allow"},
    )
    coordinator = Coordinator(config, [ServedModel.from_dir(oracle[0], name="tiny")])
    with ExitStack() as stack:
        names = stack.enter_context(two_namespaces())
        links = (LossyLink(names[0], DEVICE), LossyLink(names[1], DEVICE))
        workers = [
            stack.enter_context(WorkerProcess(role, oracle[0], folder / f"{role.value}.sock", config, name))
            for role, name in zip((Role.PREFILL, Role.DECODE), names, strict=True)
        ]
        for worker in workers:
            await asyncio.to_thread(worker.until_ready)
        endpoints = await coordinator.start()
        try:
            for worker in workers:
                await coordinator.add_worker(worker.address)
            async with AsyncClient(endpoints.grpc, timeout_s=60) as client:
                yield Divided(client, coordinator, oracle, links)
        finally:
            await coordinator.stop(0.0)


def test_lost_packets_and_a_partition_cost_time_and_typed_errors_and_nothing_else(
    tiny_oracle: Oracle, tmp_path: Path
) -> None:
    async def play() -> None:
        async with divided(tiny_oracle, tmp_path) as pair:
            whole = await pair.ask(300, seed=1)
            assert isinstance(whole, Completion)
            assert whole.timings.transfer_path == "tcp"
            assert whole.timings.bytes_moved > 0

            pair.lose(0.03)
            answers = await asyncio.gather(*(pair.ask(200 + seed, seed) for seed in range(24)))
            assert pair.lost > 0
            assert sum(isinstance(answer, Completion) for answer in answers) > 12
            pair.lose(0.0)
            await pair.until_every_block_is_back()

            before = pair.lost
            asked = [asyncio.create_task(pair.ask(900, seed)) for seed in range(50, 54)]
            pair.lose(1.0)
            began = time.monotonic()
            asked += [asyncio.create_task(pair.ask(100, seed)) for seed in range(60, 64)]
            answers = await asyncio.gather(*asked)
            assert pair.lost > before
            # Those under way have to start over; where the pair is known to be cut, others go around it.
            assert any(isinstance(a, PdServeError) or a.timings.attempts > 1 for a in answers), (
                "nothing was cut"
            )
            assert time.monotonic() - began < 55, "it took longer than the clients' deadline"

            pair.lose(0.0)
            async with asyncio.timeout(90):  # the pair is tried again after a while
                for seed in itertools.count(70):
                    answer = await pair.ask(150, seed)
                    if isinstance(answer, Completion) and answer.timings.bytes_moved > 0:
                        break
                    await asyncio.sleep(0.2)
            await pair.until_every_block_is_back()

    asyncio.run(play())


_END = """
import asyncio, sys
from pdserve.core.channel import connect, listen
from pdserve.core.messages import Hello

async def hear(channel):
    print("met", flush=True)
    while await channel.receive() is not None: pass
    print("ended", flush=True)
    channel.abort()

async def main(address, listens):
    if listens == "listens":
        over = asyncio.Event()
        async def accept(channel):
            await hear(channel)
            over.set()
        server, _ = await listen(address, accept, dead_host_s=2.0)
        print("listens", flush=True)
        await over.wait()
        server.close()
    else:
        channel = await connect(address, dead_host_s=2.0)
        async def speak():
            while True:
                channel.send([Hello(protocol=1, sender="x")])
                await asyncio.sleep(0.1)
        speaking = asyncio.create_task(speak())
        await hear(channel)
        speaking.cancel()

asyncio.run(main(*sys.argv[1:]))
"""
"""One end of a channel in a process of its own: the one that dials speaks, the other only listens."""


def test_a_connection_to_a_host_that_has_vanished_ends_on_both_sides() -> None:
    with two_namespaces() as names, ExitStack() as stack:
        links = [LossyLink(name, DEVICE) for name in names]
        ends = []
        for name, manner in zip(names, ("listens", "speaks"), strict=True):
            command = [*within(name), sys.executable, "-c", _END, f"tcp:{ADDRESSES[0]}:4711", manner]
            end = stack.enter_context(subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True))
            stack.callback(end.kill)
            assert end.stdout is not None
            assert end.stdout.readline() == ("listens\n" if manner == "listens" else "met\n")
            ends.append(end)
        assert ends[0].stdout.readline() == "met\n"
        for link in links:
            link.lose(1.0)
        began = time.monotonic()
        for end in ends:
            assert end.stdout.readline() == "ended\n"
            assert end.wait(30) == 0
        assert time.monotonic() - began < 20, "only the kernel's own patience ended it"
        assert links[0].lost > 0
