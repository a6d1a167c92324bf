"""Workers that change their role under load: nothing is lost, and the planner finds its split."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest

from coordinator.events import ChangeWorkerRole
from coordinator.planner.planner import PlannerRules
from coordinator.simulator.compare import simulate
from coordinator.simulator.profile import Profile
from coordinator.simulator.results import Tally, summarise
from coordinator.simulator.workload import Arrival, SlaClass
from coordinator.simulator.world import Setup, World
from pdserve.core.config import Admission, LocalPrefill, RoutingPolicy
from pdserve.core.errors import PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

PROFILE = Profile(
    prefill_step=2e-3,
    prefill_token=1e-4,
    prefill_pair=1e-9,
    decode_step=1e-2,
    decode_seq=1e-4,
    decode_context=1e-7,
    transfer_latency=1e-3,
    transfer_bytes_per_s=1e10,
    kv_token_bytes=1000,
    num_blocks=4000,
    max_num_seqs=64,
)
CHAT = SlaClass(name="chat", ttft_s=1.0, tpot_s=0.02)
SETUP = Setup(
    prefill=2,
    decode=2,
    profile=PROFILE,
    policy=RoutingPolicy.SLA,
    admission=Admission.TTFT,
    local_prefill=LocalPrefill.NEVER,
)


def load(start: float, seconds: float, rate: float, prompt: int, answer: int) -> list[Arrival]:
    rng = random.Random(f"{start}/{rate}")
    at, arrivals = start, []
    while (at := at + rng.expovariate(rate)) < start + seconds:
        arrivals.append(
            Arrival(
                at_s=at,
                input_tokens=round(prompt * rng.uniform(0.5, 1.5)),
                output_tokens=round(answer * rng.uniform(0.5, 1.5)),
                sla=CHAT,
            )
        )
    return arrivals


def test_the_planner_turns_workers_round_when_the_load_does() -> None:
    arrivals = load(0.0, 20.0, 20.0, 2000, 10) + load(20.0, 20.0, 60.0, 200, 100)
    rules = PlannerRules(interval_s=2.0, dwell_s=4.0, local_share=0.0)
    run = World(replace(SETUP, planner=rules), arrivals).run()
    reading = [text for at, text in run.flips if at < 22 and "becomes prefill" in text]
    writing = [text for at, text in run.flips if at > 20 and "becomes decode" in text]
    assert reading
    assert writing


def test_a_worker_flips_there_and_back_under_load_and_every_answer_is_whole() -> None:
    arrivals = load(0.0, 24.0, 12.0, 400, 200)
    world = World(replace(SETUP, policy=RoutingPolicy.ROUND_ROBIN), arrivals)
    for at, role in ((6.0, Role.PREFILL), (16.0, Role.DECODE)):
        change = ChangeWorkerRole(worker=WorkerId("decode-0001"), role=role)
        world.clock.at(at, partial(lambda now, event: world.handle(event, now), event=change))
    run = world.run()
    assert len(run.ended) == len(arrivals)
    answered = [e for e in run.ended if not isinstance(e.outcome, PdServeError)]
    assert len(answered) >= 0.9 * len(arrivals)
    assert all(e.report.output_tokens == e.arrival.output_tokens for e in answered)
    assert any(e.report.migrations for e in answered), "what ran there went on elsewhere"
    assert any(e.report.prefill_worker == "decode-0001" for e in answered)
    late = [e for e in answered if e.report.decode_worker == "decode-0001" and e.arrival.at_s > 18]
    assert late, "and it wrote answers again"
    assert all(not s.blocks_placed and not s.prefill_left for s in world.registry.fleet)


@pytest.mark.slow
def test_the_planner_comes_within_a_tenth_of_the_best_fixed_split() -> None:
    """Long prompts and short answers, then the other way round."""
    arrivals = load(0.0, 150.0, 13.0, 2000, 10) + load(150.0, 150.0, 50.0, 200, 200)
    setup = replace(SETUP, prefill=2, decode=3)
    fixed = [simulate(replace(setup, prefill=n, decode=5 - n), arrivals).goodput for n in (1, 2, 3)]
    planning = replace(setup, planner=PlannerRules(interval_s=3.0, dwell_s=6.0, local_share=0.0))
    tally = Tally()
    run = World(planning, arrivals, tally.add).run()
    assert run.flips
    assert summarise(run, tally).goodput >= 0.9 * max(fixed)
    assert len(run.flips) <= 6, "no flapping"
