"""Modelled workers do what the product's do in either role: keep answers, send beginnings, tell of both."""

from __future__ import annotations

import random
from dataclasses import replace

from coordinator.fetch_tally import FetchOutcome
from coordinator.fleet import WorkerState
from coordinator.latency import Work
from coordinator.simulator.compare import simulate
from coordinator.simulator.profile import Profile
from coordinator.simulator.workload import Arrival, SlaClass
from coordinator.simulator.world import Setup, World
from coordinator.sla import reading_s
from pdserve.core.config import Admission, LocalPrefill, RoutingPolicy, WholeOnPrefill
from pdserve.core.errors import PdServeError
from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.messages import Role
from tests.support.model_workers import worker_info

PROFILE = Profile(
    prefill_step=2e-3,
    prefill_token=5e-5,
    prefill_pair=1e-9,
    decode_step=1e-2,
    decode_seq=1e-3,
    decode_context=1e-7,
    transfer_latency=5e-2,
    transfer_bytes_per_s=1e10,
    kv_token_bytes=1000,
    num_blocks=2000,
    max_num_seqs=8,
)
CHAT = SlaClass(name="chat", ttft_s=1.0)
SETUP = Setup(
    prefill=1, decode=1, profile=PROFILE, policy=RoutingPolicy.SLA, local_prefill=LocalPrefill.NEVER
)


def arrivals(
    count: int, gap_s: float, prompt: int, answer: int, blocks: tuple[tuple[int, ...], ...] = ((),)
) -> list[Arrival]:
    return [
        Arrival(
            at_s=1.0 + gap_s * index,
            input_tokens=prompt,
            output_tokens=answer,
            sla=CHAT,
            hash_ids=blocks[index % len(blocks)],
        )
        for index in range(count)
    ]


def test_a_prefill_worker_keeps_short_answers_while_the_decode_worker_is_full() -> None:
    """Sixteen at once, of which eight fit there."""
    burst = arrivals(16, 0.0, 200, 40)
    auto, never = (World(replace(SETUP, whole_on_prefill=whole), burst).run() for whole in WholeOnPrefill)
    kept = [e for e in auto.ended if e.report.decode_worker.startswith("prefill")]
    assert not [e for e in never.ended if e.report.decode_worker.startswith("prefill")]
    assert len(kept) >= 4
    assert all(not isinstance(e.outcome, PdServeError) for e in auto.ended)
    assert all(e.report.output_tokens == 40 for e in auto.ended)
    assert all(e.report.prefill_worker == "" and e.report.bytes_moved == 0 for e in kept)
    took_s = [max(e.report.ended for e in run.ended) - 1.0 for run in (auto, never)]
    assert took_s[0] < 0.85 * took_s[1]


def test_a_prompt_is_predicted_to_take_longer_where_answers_are_kept() -> None:
    state = WorkerState(info=worker_info("prefill-0", Role.PREFILL), model="m")
    for index in range(1, 20):
        state.latency.prefill.learn(Work.of(0, 100 * index, ends=True).features, 0.001 * index)
        state.latency.decode.learn((1, index, 100 * index), 0.02)
    work = Work.of(0, 4000, ends=True)
    alone_s = reading_s(state, work)
    for index in range(4):
        attempt = AttemptId(RequestId(f"r{index}"), 0)
        state.place_decode(attempt, 300)
        state.decodes(attempt)
    steps = 4000 / state.latency.chunk_tokens
    assert reading_s(state, work) > alone_s + 0.9 * steps * 0.02


def test_predictions_hold_at_prefill_workers_that_keep_answers() -> None:
    """Long prompts between short ones, all of whose answers are short: many are kept."""
    rng = random.Random(0)
    mixed = [
        replace(a, input_tokens=rng.choice((100, 3000)), at_s=1.0 + 0.12 * i)
        for i, a in enumerate(arrivals(400, 0.0, 100, 30))
    ]
    setup = replace(SETUP, whole_on_prefill=WholeOnPrefill.AUTO, admission=Admission.OFF)
    run = World(setup, mixed).run()
    kept = [e for e in run.ended[100:] if e.report.decode_worker.startswith("prefill")]
    ratios = sorted(
        (e.report.ttft_s or 0.0) / (e.report.predicted_ttft_s or 1.0)
        for e in run.ended[100:]
        if e.report.prefill_worker or e in kept
    )
    assert len(kept) > 30
    assert 0.7 < ratios[len(ratios) // 2] < 1.2
    assert ratios[int(0.9 * len(ratios))] < 1.5


def test_a_beginning_that_another_prefill_worker_has_is_sent_instead_of_read() -> None:
    """Each in turn gets one of them."""
    slow = replace(PROFILE, prefill_token=2e-4, transfer_latency=1e-3, max_num_seqs=64)
    others = tuple((100 + i, 200 + i) for i in range(24))
    learning = arrivals(24, 0.5, 1100, 2, others)
    alike = [replace(a, at_s=a.at_s + 20.0) for a in arrivals(8, 1.0, 3600, 2, ((1, 2, 3, 4, 5, 6),))]
    load = [*learning, *alike]
    setup = replace(SETUP, prefill=4, profile=slow, policy=RoutingPolicy.ROUND_ROBIN)
    world = World(replace(setup, fetch_prefixes=True), load)
    run, without = world.run(), World(setup, load).run()
    assert len(run.ended) == len(load)
    assert world.registry.fetched.count(FetchOutcome.ARRIVED) == 3
    assert not world.registry.num_fetching
    assert not world.registry.num_unsettled

    slowest_s = [sorted(e.report.ttft_s or 0.0 for e in r.ended[24:])[-2] for r in (run, without)]
    assert slowest_s[0] < 0.6 * slowest_s[1]


def test_the_coordinator_learns_who_has_what_and_sends_prompts_there() -> None:
    """Three conversations of two thousand tokens in turn, three prefill workers."""
    blocks = ((1, 2, 3, 4), (11, 12, 13, 14), (21, 22, 23, 24))
    turns = arrivals(60, 0.3, 2100, 3, blocks)
    setup = replace(SETUP, prefill=3)
    aware, blind = (
        simulate(replace(setup, policy=policy), turns)
        for policy in (RoutingPolicy.SLA, RoutingPolicy.ROUND_ROBIN)
    )
    assert aware.all.ttft_p50_s < 0.5 * PROFILE.prefill_s(2100, 2100 * 2100 / 2)
    assert aware.all.ttft_p90_s <= blind.all.ttft_p90_s


def test_a_worker_that_forgets_blocks_says_so() -> None:
    """Room for about twenty prompts of four blocks; a hundred come, and none begins like another."""
    small = replace(PROFILE, num_blocks=700)
    others = tuple((4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3) for i in range(100))
    world = World(replace(SETUP, profile=small), arrivals(100, 0.3, 2100, 3, others))
    world.run()
    # 64 bits of each block of 64 tokens, of both workers.
    assert 0 < world.registry._book.prefixes.num_blocks <= 2 * 700
