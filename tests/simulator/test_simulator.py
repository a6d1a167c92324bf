"""The real registry and router among modelled workers: nothing is lost, time adds up, seeds repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.simulator.compare import compare, simulate, table
from coordinator.simulator.profile import GPUS, ModelSize, Profile, analytic, gpu_named
from coordinator.simulator.results import good
from coordinator.simulator.workload import Arrival, SlaClass, from_trace, generated
from coordinator.simulator.world import Ended, Failures, Setup, World
from pdserve.bench.arrivals import ArrivalKind, Arrivals
from pdserve.bench.traces import TraceRow
from pdserve.core.config import Admission, RoutingPolicy
from pdserve.core.errors import ConfigError, PdServeError

PROFILE = Profile(
    prefill_step=2e-3,
    prefill_token=5e-5,
    prefill_pair=1e-9,
    decode_step=1e-2,
    decode_seq=1e-4,
    decode_context=1e-7,
    transfer_latency=1e-3,
    transfer_bytes_per_s=1e10,
    kv_token_bytes=1000,
    num_blocks=2000,
)
CHAT = SlaClass(name="chat", ttft_s=0.5, tpot_s=0.03)
SETUP = Setup(prefill=2, decode=2, profile=PROFILE, policy=RoutingPolicy.SLA)
LENGTHS = [TraceRow(at_s=0, input_tokens=n, output_tokens=m) for n, m in ((200, 20), (1500, 60), (4000, 5))]


def workload(rate: float, duration_s: float, *, kind: ArrivalKind = ArrivalKind.POISSON) -> list[Arrival]:
    return generated(
        LENGTHS,
        [CHAT],
        arrivals=Arrivals(kind=kind),
        rate=rate,
        duration_s=duration_s,
        seed=3,
        max_tokens=8192,
    )


def one(prompt: int, answer: int) -> Sequence[Arrival]:
    return [Arrival(at_s=1.0, input_tokens=prompt, output_tokens=answer, sla=CHAT)]


def test_a_lone_request_takes_the_time_its_profile_says() -> None:
    (ended,) = World(SETUP, one(1000, 101)).run().ended
    read = PROFILE.prefill_s(1000, 1000 * 1000 / 2)
    assert ended.report.ttft_s == pytest.approx(read, abs=2e-3)
    written = sum(PROFILE.step_s(1, 1001 + i) for i in range(100))
    exposed = 1e-3 + 1000 * 1000 / 1e10
    assert ended.report.tpot_s == pytest.approx((written + exposed) / 100, rel=0.02)


def test_a_lone_request_of_a_colocated_worker_reads_in_chunks() -> None:
    (ended,) = World(replace(SETUP, prefill=0), one(1000, 101)).run().ended
    read = PROFILE.prefill_s(1000, 1000 * 1000 / 2) + PROFILE.prefill_step
    assert ended.report.ttft_s == pytest.approx(read, abs=2e-3)
    assert ended.report.tpot_s == pytest.approx(PROFILE.step_s(1, 1050), rel=0.03)


@pytest.mark.parametrize("prefill", [0, 2])
@pytest.mark.parametrize("policy", list(RoutingPolicy))
def test_every_request_ends_and_the_registry_is_at_rest(policy: RoutingPolicy, prefill: int) -> None:
    arrivals = workload(8.0, 20.0)
    world = World(replace(SETUP, policy=policy, prefill=prefill), arrivals)
    run = world.run()
    assert len(run.ended) == len(arrivals)
    assert world.registry.num_active == 0
    assert all(not isinstance(e.outcome, PdServeError) for e in run.ended)
    assert all(e.report.output_tokens == e.arrival.output_tokens for e in run.ended)
    assert all(not s.blocks_placed and not s.prefill_left for s in world.registry.fleet)


def test_the_same_seed_makes_the_same_decisions_and_another_seed_others() -> None:
    arrivals = workload(20.0, 20.0, kind=ArrivalKind.GAMMA)
    failing = replace(SETUP, policy=RoutingPolicy.POWER_OF_TWO, failures=Failures(per_worker_hour=200.0))
    first, again = World(failing, arrivals).run(), World(failing, arrivals).run()
    assert first.decisions == again.decisions
    assert [e.report for e in first.ended] == [e.report for e in again.ended]
    assert World(replace(failing, seed=1), arrivals).run().decisions != first.decisions


def test_requests_outlive_the_workers_that_die() -> None:
    arrivals = workload(5.0, 60.0)
    failing = replace(SETUP, failures=Failures(per_worker_hour=120.0, repair_s=5.0), decode=3)
    run = World(failing, arrivals).run()
    assert len(run.ended) == len(arrivals)
    retried = [e for e in run.ended if e.report.attempts > 1]
    assert retried
    answered = [e for e in run.ended if not isinstance(e.outcome, PdServeError)]
    assert len(answered) >= 0.98 * len(arrivals)
    assert all(e.report.output_tokens == e.arrival.output_tokens for e in answered)


def test_under_overload_early_refusal_keeps_the_goodput_that_queueing_loses() -> None:
    arrivals = workload(60.0, 30.0)
    off = simulate(replace(SETUP, admission=Admission.OFF), arrivals)
    refusing = simulate(replace(SETUP, admission=Admission.TTFT), arrivals)
    assert off.all.attainment < 0.3
    assert refusing.goodput > 2 * off.goodput
    assert refusing.all.refused > 0


def test_little_is_refused_that_would_have_been_served_in_time() -> None:
    arrivals = workload(8.0, 60.0)
    off = {e.report.id: e for e in World(replace(SETUP, admission=Admission.OFF), arrivals).run().ended}
    refusing = World(replace(SETUP, admission=Admission.TTFT), arrivals).run()
    wrong = [e for e in refusing.ended if isinstance(e.outcome, PdServeError) and good(off[e.report.id])]
    assert len(wrong) <= 0.01 * len(arrivals)


def test_colocated_workers_refuse_in_time_and_keep_what_they_promise() -> None:
    """At more than four of them can serve; a step with a chunk takes twice as long as one without."""
    setup = replace(SETUP, prefill=0, decode=4, admission=Admission.TARGETS)
    profile = replace(PROFILE, colocated_chunk_tokens=256)
    result = simulate(replace(setup, profile=profile), workload(60.0, 60.0))
    assert result.all.refused > 0.2 * result.all.requests
    assert result.all.attainment > 0.98
    assert (result.ttft_error or 1.0) < 0.15


def test_predictions_of_ttft_come_within_a_tenth() -> None:
    result = simulate(replace(SETUP, admission=Admission.OFF), workload(15.0, 60.0))
    assert result.ttft_error is not None
    assert result.ttft_error < 0.1


def test_a_comparison_is_a_table_with_a_row_for_every_policy() -> None:
    rows = compare(SETUP, workload(10.0, 5.0))
    text = table(rows)
    for policy in RoutingPolicy:
        assert f"| {policy.value} |" in text
    assert text.count("colocated") == 3


def test_classes_are_drawn_by_their_shares_and_reported_apart() -> None:
    rows = [TraceRow(at_s=float(i), input_tokens=100, output_tokens=5) for i in range(400)]
    batch = SlaClass(name="batch", share=3.0)
    arrivals = from_trace(rows, [CHAT, batch], speed=2.0, seed=0, max_tokens=8192)
    assert 0.65 < sum(a.sla is batch for a in arrivals) / 400 < 0.85
    assert arrivals[-1].at_s == 399 / 2
    result = simulate(SETUP, arrivals)
    assert [c.name for c in result.classes] == ["all", "batch", "chat"]
    assert sum(c.requests for c in result.classes[1:]) == result.all.requests == 400


def test_an_analytic_profile_follows_from_model_and_gpu() -> None:
    llama = ModelSize(params=8e9, layers=32, heads=32, kv_heads=8, head_dim=128)
    one_gpu, two = analytic(llama, GPUS["h100"]), analytic(llama, GPUS["h100"], tensor_parallel=2)
    assert one_gpu.kv_token_bytes == 131072
    assert one_gpu.prefill_token == pytest.approx(2 * 8e9 / (989e12 * 0.5))
    assert two.prefill_token == pytest.approx(one_gpu.prefill_token / (2 * 0.93))
    assert two.num_blocks > 2 * one_gpu.num_blocks
    with pytest.raises(ConfigError, match="no room"):
        analytic(replace(llama, params=70e9), GPUS["h100"])
    with pytest.raises(ConfigError, match="b300"):
        gpu_named("b300")


def test_a_step_with_prompts_and_answers_reads_the_weights_once_where_it_is_fused() -> None:
    llama = ModelSize(params=8e9, layers=32, heads=32, kv_heads=8, head_dim=128)
    fused = analytic(llama, GPUS["h100"], sharpness=float("inf"))
    work = (200.0, 20_000.0, 16, 16_000.0)
    apart = replace(fused, fused=False).mixed_s(*work)
    assert apart == pytest.approx(fused.prefill_s(*work[:2]) + fused.step_s(*work[2:]))
    assert fused.mixed_s(*work) < 0.7 * apart
    assert replace(fused, sharpness=1.0).mixed_s(*work) > replace(fused, sharpness=2.0).mixed_s(*work)
    assert fused.mixed_s(*work[:2], 0, 0) == fused.prefill_s(*work[:2])


def test_prompts_that_begin_alike_are_read_from_where_they_differ() -> None:
    def arrival(at_s: float, *blocks: int) -> Arrival:
        tokens = len(blocks) * 512 + 100
        return Arrival(at_s=at_s, input_tokens=tokens, output_tokens=5, sla=CHAT, hash_ids=blocks)

    arrivals = [arrival(1.0, 1, 2, 3), arrival(2.0, 1, 2, 4), arrival(3.0, 5, 6, 7)]
    for setup in (replace(SETUP, prefill=1), replace(SETUP, prefill=0, decode=1)):
        first, second, third = World(setup, arrivals).run().ended
        assert second.report.ttft_s is not None
        assert first.report.ttft_s is not None
        assert second.report.ttft_s < 0.6 * first.report.ttft_s
        assert third.report.ttft_s == pytest.approx(first.report.ttft_s, rel=0.1)


def test_what_ends_can_be_counted_without_being_kept() -> None:
    ended: list[Ended] = []
    run = World(SETUP, workload(8.0, 5.0), ended.append).run()
    assert not run.ended
    assert ended == World(SETUP, workload(8.0, 5.0)).run().ended


def test_what_is_no_dense_model_has_no_analytic_profile(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelSize.from_config(path)
