"""Batch work that fills a worker gives way in the simulator too, and is finished all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.simulator.profile import GPUS, ModelSize, analytic
from coordinator.simulator.workload import Arrival, SlaClass
from coordinator.simulator.world import Ended, Setup, World
from pdserve.core.config import RoutingPolicy
from pdserve.core.messages import FinishReason

_8B = ModelSize(params=8.03e9, layers=32, heads=32, kv_heads=8, head_dim=128)
INTERACTIVE = SlaClass(name="interactive", ttft_s=0.5)


def run(*, preemptible: bool) -> dict[str, list[Ended]]:
    """Eight places full of long batch answers, and an interactive request every quarter of a second."""
    batch = SlaClass(name="batch", priority=10, preemptible=preemptible)
    arrivals = [Arrival(at_s=0.01 * i, input_tokens=200, output_tokens=2000, sla=batch) for i in range(16)]
    arrivals += [
        Arrival(at_s=2.0 + 0.25 * i, input_tokens=200, output_tokens=20, sla=INTERACTIVE) for i in range(20)
    ]
    profile = replace(analytic(_8B, GPUS["h100"]), max_num_seqs=8)
    setup = Setup(prefill=1, decode=1, profile=profile, policy=RoutingPolicy.SLA)
    ended = World(setup, arrivals).run().ended
    return {name: [e for e in ended if e.arrival.sla.name == name] for name in ("batch", "interactive")}


def met(ended: list[Ended]) -> float:
    return sum(e.report.ttft_met is True for e in ended) / len(ended)


@pytest.fixture(scope="module")
def giving_way() -> dict[str, list[Ended]]:
    return run(preemptible=True)


def test_interactive_requests_are_in_time_where_batch_work_gives_way_and_not_otherwise(
    giving_way: dict[str, list[Ended]],
) -> None:
    assert met(giving_way["interactive"]) >= 0.9
    assert met(run(preemptible=False)["interactive"]) <= 0.2


def test_batch_work_is_finished_all_the_same(giving_way: dict[str, list[Ended]]) -> None:
    batch = giving_way["batch"]
    assert sum(e.report.preemptions for e in batch) >= 1
    assert max(e.report.preemptions for e in batch) <= 3
    assert {e.outcome for e in batch} == {FinishReason.LENGTH}
    assert {e.report.output_tokens for e in batch} == {2000}
