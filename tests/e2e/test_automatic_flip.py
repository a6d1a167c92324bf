"""The planner of a real deployment turns a worker round, and back, when the load asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pdserve.client import AsyncClient
from pdserve.client.admin import plan
from pdserve.core.errors import PdServeError
from pdserve.core.messages import Role
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.support.whole_cluster import RunningDeployment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Oracle = tuple[Path, PreTrainedModel]
LONG, SHORT = 1200, 16
"""Tokens of a prompt."""
ANSWER = 200
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def planned(tiny_oracle: Oracle) -> Iterator[RunningDeployment]:
    config = config_of(
        tiny_oracle[0],
        prefill={"max_num_batched_tokens": 256},
        decode={"workers": 2, "max_num_seqs": 2},
        coordinator={"local_prefill": "never", "admission": "off"},
        planner={"mode": "active", "interval_s": 1.0, "dwell_s": 4.0},
    )
    with RunningDeployment(config) as running:
        yield running


class Load:
    """Requests at an even rate, whatever becomes of them, on a thread of its own."""

    def __init__(
        self, running: RunningDeployment, *, rate: float, prompt: int, answer: int, **targets: float
    ) -> None:
        self._address, self._rate = running.deployment.grpc, rate
        self._prompt, self._answer, self._targets = prompt, answer, targets
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _send(self) -> None:
        async with AsyncClient(self._address, timeout_s=20) as client:
            asked: set[asyncio.Task[None]] = set()
            started = time.monotonic()
            for number in range(100_000):
                due = started + number / self._rate
                await asyncio.sleep(max(due - time.monotonic(), 0.0))
                if self._over.is_set():
                    break
                asked.add(asyncio.create_task(self._ask(client, number)))
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, client: AsyncClient, number: int) -> None:
        with contextlib.suppress(PdServeError):
            await client.generate(
                prompt_token_ids=prompt_of(self._prompt, seed=number),
                max_tokens=self._answer,
                temperature=0.0,
                ignore_eos=True,
                **self._targets,  # type: ignore[arg-type]  # targets alone
            )


def alone(running: RunningDeployment, prompt: int, answer: int) -> tuple[float, float]:
    """(TTFT, time per further token) in seconds of a request that has the deployment for itself."""
    seen = []
    with running.client() as client:
        for seed in range(3):
            tokens = prompt_of(prompt, seed=900 + seed)
            done = client.generate(
                prompt_token_ids=tokens, max_tokens=answer, temperature=0.0, ignore_eos=True
            )
            seen.append(done.timings)
    ttft_s = statistics.median(one.ttft_s for one in seen)
    return ttft_s, statistics.median(one.tpot_s for one in seen)


def roles(running: RunningDeployment) -> dict[str, Role]:
    return {worker.id: worker.role for worker in running.snapshot().workers if not worker.draining}


def readers(running: RunningDeployment) -> int:
    return list(roles(running).values()).count(Role.PREFILL)


def test_a_worker_is_turned_round_when_the_load_asks_for_it_and_back(
    planned: RunningDeployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="coordinator.planner")
    reading_s, _ = alone(planned, LONG, 2)
    _, step_s = alone(planned, SHORT, ANSWER)
    assert readers(planned) == 1
    # One prefill worker cannot read this in time, two can.
    with Load(planned, rate=2.0 / reading_s, prompt=LONG, answer=2, ttft_target_ms=4e3 * reading_s):
        planned.wait_until("a decode worker reads prompts", lambda: readers(planned) == 2, PATIENCE_S)
        reading = plan(planned.deployment.grpc)
    # One decode worker, of two answers at once, cannot write this.
    with Load(planned, rate=3.0 / (ANSWER * step_s), prompt=SHORT, answer=ANSWER):
        planned.wait_until("it writes answers again", lambda: readers(planned) == 1, PATIENCE_S)
    assert len(roles(planned)) == 3, "no worker was lost on the way"
    assert reading.mode == "active"
    said = [record.getMessage() for record in caplog.records if "becomes" in record.getMessage()]
    assert any("becomes prefill" in line for line in said)
    assert any("becomes decode" in line for line in said)
    planned.wait_until("every block back", planned.idle)
