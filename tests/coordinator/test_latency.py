"""What is learned from a worker's reports, and how far it can be trusted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from coordinator.latency import LatencyModel, Work
from coordinator.linear_fit import LinearFit
from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.messages import Role
from tests.support.model_workers import ModelDecode, worker_info
from tests.support.registry_world import World, new_request


def attempt(index: int) -> AttemptId:
    return AttemptId(RequestId(f"r{index}"), 0)


def seconds(prompts: float, tokens: float, pairs: float) -> float:
    return 0.004 * prompts + 2e-5 * tokens + 3e-9 * pairs


def read(model: LatencyModel, index: int, tokens: int, now: float, *, noise: float = 1.0) -> float:
    """One prompt alone on an idle worker; when it has been read."""
    model.prompt_sent(attempt(index), tokens, now)
    now += noise * seconds(*Work.of(0, tokens, ends=True).features)
    model.prompt_read(attempt(index), now)
    return now + 1.0


def taught(count: int, *, scatter: float = 0.0) -> LatencyModel:
    rng = random.Random(0)
    model, now = LatencyModel(), 0.0
    for index in range(count):
        tokens = int(10 ** rng.uniform(1, 4.5))
        now = read(model, index, tokens, now, noise=1 + rng.uniform(-scatter, scatter))
    return model


@pytest.mark.parametrize("tokens", [20, 1000, 20_000])
def test_prefill_time_is_learned_within_five_percent(tokens: int) -> None:
    work = Work.of(0, tokens, ends=True)
    assert taught(60).prefill_s(work) == pytest.approx(seconds(*work.features), rel=0.05)


def test_a_queue_takes_as_long_as_its_prompts_together() -> None:
    model = taught(60)
    one, other = Work.of(0, 900, ends=True), Work.of(0, 5000, ends=True)
    assert model.prefill_s(one + other) == pytest.approx(model.prefill_s(one) + model.prefill_s(other))


def test_the_error_bar_covers_what_is_seen_and_shrinks_with_evidence() -> None:
    work = Work.of(0, 2000, ends=True)
    fresh, model = LatencyModel(), taught(200, scatter=0.2)
    assert fresh.prefill.std(work.features) > 0.1 * fresh.prefill_s(work)
    ratio = model.prefill.std(work.features) / model.prefill_s(work)
    assert 0.05 < ratio < 0.3
    assert 0.03 < model.prefill.error < 0.25


def test_a_worker_that_became_slower_is_learned_anew() -> None:
    model, work = taught(100), Work.of(0, 3000, ends=True)
    before, now = model.prefill_s(work), 1e6
    for index in range(300):
        now = read(model, 1000 + index, 500 + 100 * (index % 50), now, noise=3.0)
    assert model.prefill_s(work) == pytest.approx(3 * before, rel=0.1)


def test_prompts_that_share_a_step_are_not_counted_twice() -> None:
    """Twenty prompts of 25 tokens in one step: the step is learned once, with the work of all of them."""
    model, now = LatencyModel(), 0.0
    for batch in range(40):
        names = [attempt(100 * batch + i) for i in range(20)]
        for name in names:
            model.prompt_sent(name, 25, now)
        now += 0.1
        for index, name in enumerate(names):
            model.prompt_read(name, now + 1e-6 * index)  # one frame, handled one after the other
        now += 1.0
    assert model.prefill.count == 39
    assert model.prefill_s(Work(20, 500, 20 * 25 * 25 / 2)) == pytest.approx(0.1, rel=0.05)


def test_what_is_cached_is_not_counted_as_computed() -> None:
    model, now = LatencyModel(), 0.0
    for index in range(50):
        model.prompt_sent(attempt(index), 10_000, now)
        model.prompt_cached(attempt(index), 9000)
        now += 1e-3 * 1000
        model.prompt_read(attempt(index), now)
        now += 1.0
    assert model.prefill_s(Work.of(9000, 10_000, ends=True)) == pytest.approx(1.0, rel=0.05)


def test_a_prompt_that_was_taken_back_teaches_nothing() -> None:
    model = LatencyModel()
    model.prompt_sent(attempt(0), 100, 0.0)
    model.prompt_sent(attempt(1), 100, 0.0)
    model.prompt_dropped(attempt(0))
    model.prompt_read(attempt(1), 50.0)
    model.prompt_sent(attempt(2), 100, 60.0)
    assert model.prefill.count == 0


def test_steps_are_learned_from_heartbeats_of_a_batch_that_moves() -> None:
    model = LatencyModel()
    decode = ModelDecode(worker_info("d", Role.DECODE))
    rng = random.Random(1)
    for step in range(1, 100):
        running, context = rng.randint(1, 64), rng.randint(100, 100_000)
        beat = replace(
            decode.heartbeat(),
            steps=step,
            running=running,
            waiting_tokens=context,
            step_s=0.01 + 2e-4 * running + 1e-7 * context,
        )
        model.heard(beat)
        model.heard(replace(beat, step_s=9.0))  # no step since: says nothing new
    assert model.step_s(32, 50_000) == pytest.approx(0.01 + 2e-4 * 32 + 5e-3, rel=0.05)
    assert model.decode.count == 99


def test_more_work_never_takes_less_time() -> None:
    """Noise that would fit a negative slope gives a slope of zero."""
    fit = LinearFit([1e-3, 1e-3])
    for index in range(50):
        fit.learn((1, index), 1.0 - 0.01 * index)
    assert min(fit.coefficients) >= 0
    assert fit.predict((1, 90)) >= fit.predict((1, 1))


def test_one_hiccup_does_not_spoil_what_was_learned() -> None:
    model, work = taught(100, scatter=0.1), Work.of(0, 2000, ends=True)
    before = model.prefill_s(work)
    read(model, 5000, 2000, 1e6, noise=100.0)
    assert model.prefill_s(work) == pytest.approx(before, rel=0.1)


def test_what_is_not_observed_any_more_stays_finite() -> None:
    fit = LinearFit([1e-3, 1e-3, 1e-3])
    for _ in range(20_000):
        fit.learn((1, 0, 0), 0.5)
    assert fit.predict((1, 0, 0)) == pytest.approx(0.5, rel=0.01)
    assert fit.predict((0, 1, 1)) == pytest.approx(1.0, rel=0.01)


def test_the_registry_teaches_its_workers_models() -> None:
    world = World()
    world.join("prefill-0", Role.PREFILL)
    world.join("decode-0", Role.DECODE)
    for index in range(3):
        world.now += 1.0
        world.submit(new_request(f"r{index}", arrived=world.now, deadline=world.now + 100))
        world.run()
    prefill = world.registry.fleet.get(next(w for w in world.workers if w == "prefill-0"))
    assert prefill is not None
    assert prefill.latency.exposed.count == 3
    assert prefill.work_left == Work()


def test_a_new_worker_begins_with_what_its_kind_was_learned_to_be() -> None:
    model, work = taught(60), Work.of(0, 3000, ends=True)
    assert LatencyModel(model).prefill_s(work) == pytest.approx(model.prefill_s(work), rel=0.05)


def test_steps_that_read_and_write_are_learned_as_one_and_counted_by_their_chunks() -> None:
    """A worker that never writes without reading: what a step of both takes does not come apart."""
    model, now, rng = LatencyModel(), 0.0, random.Random(4)
    decode = ModelDecode(worker_info("d", Role.DECODE))
    for index in range(40):
        running = rng.randint(10, 30)
        model.heard(
            replace(decode.heartbeat(), steps=index + 1, running=running, waiting_tokens=1000 * running)
        )
        prompt, step_s = 100 * rng.randint(4, 20), 0.012 + 1e-4 * running
        model.prompt_sent(attempt(index), prompt, now)
        for done in (*range(200, prompt, 200), prompt):
            now += step_s
            model.prompt_reached(attempt(index), done, now)
        now += 1.0
        model.prompt_sent(attempt(1000 + index), 1, now)  # so that the last step is closed
        model.prompt_dropped(attempt(1000 + index))
    assert model.chunk_tokens == pytest.approx(200, rel=0.1)
    work = Work.of(0, 3000, ends=True)
    seconds, std = model.beside_s(work, 20, 20_000), model.beside_std_s(work, 20, 20_000)
    assert seconds == pytest.approx(15 * 0.014, rel=0.1)
    assert 0 < std < seconds
