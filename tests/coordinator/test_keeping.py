"""When a prefill worker keeps a request whole, prompt and answer, and when its KV moves all the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from coordinator.decisions import Placement
from coordinator.fleet import Fleet, WorkerState
from coordinator.keeping import SHORT_TOKENS, Expected
from coordinator.latency import LatencyModel
from coordinator.router import Router
from pdserve.core.config import LocalPrefill, RoutingPolicy, WholeOnPrefill
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from tests.support.model_workers import ModelPrefill
from tests.support.taught_pair import MODEL, PROMPT, attempt, pair, queue_at, run_at

SHORT = Expected(answer_tokens=32.0, requests_per_s=0.5)


def placed(
    fleet: Fleet,
    expected: Expected = SHORT,
    *,
    setting: WholeOnPrefill = WholeOnPrefill.AUTO,
    prefer: Placement | None = None,
) -> Placement:
    router = Router(RoutingPolicy.POWER_OF_TWO, 0, LocalPrefill.AUTO, setting)
    placement = router.place(fleet, MODEL, PROMPT, expected=expected, prefer=prefer)
    assert placement is not None
    return placement


def is_kept(placement: Placement) -> bool:
    return placement.decode.worker == "prefill-0" and placement.prefill is None


def keep_at(prefill: WorkerState, count: int) -> None:
    run_at(prefill, count)


def test_a_short_answer_stays_where_its_prompt_is_read_while_the_decode_worker_is_busy() -> None:
    _, decode, fleet = pair()
    run_at(decode, 8)
    placement = placed(fleet)
    assert is_kept(placement)
    kept, *others = placement.routes
    assert kept.decode == "prefill-0"
    assert kept.prefill is None
    assert [route.decode for route in others] == ["decode-0", "decode-0"]
    assert "cheaper to keep it whole" in str(placement)


def test_with_an_idle_decode_worker_its_kv_moves() -> None:
    placement = placed(pair()[2])
    assert not is_kept(placement)
    assert [route.decode for route in placement.routes] == ["decode-0", "decode-0", "prefill-0"]


def test_a_long_answer_is_for_the_decode_worker() -> None:
    _, decode, fleet = pair()
    run_at(decode, 8)
    assert not is_kept(placed(fleet, Expected(answer_tokens=SHORT_TOKENS + 1)))


def test_it_can_be_forbidden() -> None:
    _, decode, fleet = pair()
    run_at(decode, 8)
    placement = placed(fleet, setting=WholeOnPrefill.NEVER)
    assert {route.decode for route in placement.routes} == {"decode-0"}


@pytest.mark.parametrize(("queued", "kept"), [(0, True), (20, False)])
def test_prompts_that_wait_there_are_not_made_to_wait_longer(queued: int, kept: bool) -> None:
    prefill, decode, fleet = pair()
    run_at(decode, 6)
    queue_at(prefill, queued)
    assert is_kept(placed(fleet)) == kept


def test_prompts_that_are_expected_count_too() -> None:
    """At five a second, 0.18 s each, hardly any time is left for answers."""
    _, decode, fleet = pair()
    run_at(decode, 6)
    assert is_kept(placed(fleet))
    assert not is_kept(placed(fleet, replace(SHORT, requests_per_s=5.0)))


def test_the_more_it_keeps_already_the_less_it_takes() -> None:
    prefill, decode, fleet = pair()
    run_at(decode, 6)
    keep_at(prefill, 6)
    assert not is_kept(placed(fleet))


def test_a_burst_keeps_both_workers_writing() -> None:
    _, decode, fleet = pair()
    router = Router(RoutingPolicy.POWER_OF_TWO, 0, LocalPrefill.AUTO, WholeOnPrefill.AUTO)
    writers = Counter[str]()
    for index in range(16):
        placement = router.place(fleet, MODEL, PROMPT, expected=Expected(answer_tokens=64.0))
        assert placement is not None
        writer, reader = placement.decode.worker, placement.prefill or placement.decode
        writers[writer] += 1
        for name, place in ((writer, "decode"), (reader.worker, "prefill")):
            worker = fleet.get(name)
            assert worker is not None
            if place == "decode":
                worker.place_decode(attempt(f"b{index}"), PROMPT)
                worker.reserved(attempt(f"b{index}"))
            else:
                worker.place_prefill(attempt(f"b{index}"), PROMPT)
    assert 3 <= writers["prefill-0"] <= 9
    assert writers["decode-0"] == 16 - writers["prefill-0"]
    assert decode.num_placed == writers["decode-0"]


def test_an_idle_prefill_worker_takes_even_a_long_one_where_no_decode_worker_has_room() -> None:
    prefill, decode, fleet = pair()
    decode.refused()
    long = Expected(answer_tokens=1000.0)
    placement = placed(fleet, long)
    assert is_kept(placement)
    assert "no decode worker has room" in str(placement)
    queue_at(prefill, 1)
    router = Router(RoutingPolicy.POWER_OF_TWO, 0, LocalPrefill.AUTO, WholeOnPrefill.AUTO)
    assert router.place(fleet, MODEL, PROMPT, expected=long) is None


def test_further_samples_follow_the_first_and_never_into_a_push_from_a_worker_to_itself() -> None:
    prefill, decode, fleet = pair()
    run_at(decode, 8)
    first = placed(fleet)
    assert is_kept(first)
    assert is_kept(placed(fleet, prefer=first))
    prefill.refused()  # no room for another
    again = placed(fleet, prefer=first)
    assert again.decode.worker == "decode-0"


def test_how_fast_a_prefill_worker_writes_is_learned_from_what_it_keeps() -> None:
    prefill, _, _ = pair()
    keep_at(prefill, 4)
    model = ModelPrefill(prefill.info)
    for steps in range(1, 20):
        prefill.heard(replace(model.heartbeat(), steps=10 * steps, busy_s=0.4 * steps))
    assert prefill.latency.decode.count >= 5
    assert prefill.latency.step_s(*prefill.batch) == pytest.approx(0.04, rel=0.2)


def test_a_decode_worker_that_is_new_is_taken_to_be_as_fast() -> None:
    prefill, decode, fleet = pair()
    for running in range(1, 20):
        prefill.latency.decode.learn((1, running, 160 * running), 0.001)
    decode.latency = LatencyModel()  # which believes in 10 ms a step
    assert not is_kept(placed(fleet))


def test_prompts_alone_teach_nothing_of_writing() -> None:
    prefill, _, _ = pair()
    queue_at(prefill, 3)
    model = ModelPrefill(prefill.info)
    for steps in range(1, 20):
        prefill.heard(replace(model.heartbeat(), steps=10 * steps, busy_s=0.4 * steps, running=3))
    assert prefill.latency.decode.count == 0
    assert prefill.info.role is Role.PREFILL
    assert prefill.id == WorkerId("prefill-0")
