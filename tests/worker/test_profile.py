"""A worker measures how fast it is before it takes requests, and the coordinator predicts with that."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from coordinator.events import WorkerJoined
from coordinator.latency import LatencyModel, Work
from coordinator.service import make_registry
from pdserve.core.codec import decode_frame, encode_frame
from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.worker_state import ProfileStep
from pdserve.worker.profile import measure
from tests.support.model_workers import worker_info
from tests.support.planner_fleet import PROFILE
from tests.support.token_engine import TokenEngine


def test_a_few_prompts_and_decode_steps_are_measured_and_the_first_of_each_kind_is_not_told() -> None:
    engine = TokenEngine(num_blocks=64)
    steps = measure(engine, 5.0, max_tokens=128, max_seqs=4)
    assert [step.prompt_tokens for step in steps if step.prompt_tokens] == [128, 32] * 2
    assert [step.sequences for step in steps if step.sequences] == [1, 2, 4] * 2
    assert all(step.seconds > 0 for step in steps)


def test_a_slow_worker_measures_only_what_its_time_allows() -> None:
    ticks = itertools.count()
    steps = measure(
        TokenEngine(num_blocks=64), 10.0, max_tokens=512, max_seqs=8, clock=lambda: float(next(ticks))
    )
    assert 0 < next(ticks) < 30
    assert len(steps) < 10


def test_a_pool_of_few_blocks_is_enough() -> None:
    steps = measure(TokenEngine(num_blocks=9), 5.0, max_tokens=512, max_seqs=8)
    assert [step.sequences for step in steps if step.sequences] == [1, 1]


def test_predictions_are_right_from_the_first_request() -> None:
    steps = [
        ProfileStep(prompt_tokens=n, sequences=0, context_tokens=0, seconds=PROFILE.prefill_s(n, n * n / 2))
        for n in (16, 64, 128, 256)
    ]
    steps += [
        ProfileStep(prompt_tokens=0, sequences=n, context_tokens=32 * n, seconds=PROFILE.step_s(n, 32 * n))
        for n in (1, 2, 4)
    ]
    model = LatencyModel()
    model.profiled(steps)
    wanted_s = PROFILE.prefill_s(200, 200 * 200 / 2)
    assert model.prefill_s(Work.of(0, 200, ends=True)) == pytest.approx(wanted_s, rel=0.1)
    assert model.step_s(3, 96) == pytest.approx(PROFILE.step_s(3, 96), rel=0.05)
    assert LatencyModel().prefill_s(Work.of(0, 200, ends=True)) > 5 * wanted_s, "a guess, without a profile"
    model.prefill.learn(Work.of(0, 200, ends=True).features, wanted_s)
    assert model.fits()["prefill"].error < 0.5, "which the calibration metric shows"


def test_a_profile_crosses_the_wire_and_seeds_the_model_of_a_worker_that_joins() -> None:
    step = ProfileStep(prompt_tokens=0, sequences=2, context_tokens=64, seconds=0.03)
    info = dataclasses.replace(worker_info(WorkerId("decode-0"), Role.DECODE), profile=[step])
    (heard,) = decode_frame(encode_frame([info]))
    assert heard == info
    registry = make_registry(ServeConfig())
    registry.handle(WorkerJoined(info=info, model="m"), 0.0)
    state = registry.fleet.get(WorkerId("decode-0"))
    assert state is not None
    assert state.latency.step_s(2, 64) == pytest.approx(0.03)
