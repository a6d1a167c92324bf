"""A request's own targets, then its class as the model has it, then as the coordinator has it."""

from __future__ import annotations

import pytest

from coordinator.contract import Classes, Contract, resolve
from pdserve.core.config import CoordinatorSettings
from pdserve.core.errors import InvalidRequest
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sla_settings import SlaClassSettings

CLASSES = {
    "gold": SlaClassSettings(ttft_target_ms=500, tokens_per_second=20, deadline_s=30, priority=-1),
    "batch": SlaClassSettings(priority=10, preemptible=True, queue_ttl_s=60),
}


def contract(of_model: Classes | None = None, default_class: str | None = None, **fields: object) -> Contract:
    request = pb.GenerateRequest(**fields)  # type: ignore[arg-type]  # forwarded
    return resolve(request, CLASSES, of_model or {}, default_class)


def test_a_class_fills_in_what_the_request_leaves_open() -> None:
    assert contract(sla_class="gold") == Contract(
        sla_class="gold", ttft_target_s=0.5, tpot_target_s=0.05, deadline_s=30, priority=-1
    )
    own = contract(sla_class="gold", ttft_target_ms=100.0, tpot_target_ms=10.0, deadline_ms=5e3, priority=0)
    assert (own.ttft_target_s, own.tpot_target_s, own.deadline_s, own.priority) == (0.1, 0.01, 5.0, 0)


def test_the_models_class_goes_before_the_coordinators() -> None:
    mine = contract({"gold": SlaClassSettings(tpot_target_ms=80)}, sla_class="gold")
    assert (mine.tpot_target_s, mine.ttft_target_s) == (0.08, 0.5)


def test_who_names_no_class_gets_the_default_one_or_none() -> None:
    assert contract() == Contract()
    assert contract(default_class="batch") == Contract(
        sla_class="batch", priority=10, preemptible=True, queue_ttl_s=60
    )


def test_a_speed_is_a_time_per_token() -> None:
    assert contract(tokens_per_second=40.0).tpot_target_s == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("sla_class", {"sla_class": "silver"}),
        ("tokens_per_second", {"tokens_per_second": 0.0}),
        ("tokens_per_second", {"tokens_per_second": float("nan")}),
        ("tokens_per_second", {"tokens_per_second": 10.0, "tpot_target_ms": 100.0}),
        ("ttft_target_ms", {"ttft_target_ms": -1.0}),
        ("deadline_ms", {"deadline_ms": float("inf")}),
    ],
)
def test_a_promise_that_nobody_can_keep_is_refused_by_name(field: str, fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        contract(**fields)
    assert caught.value.field == field


def test_standard_classes_stay_when_others_are_added() -> None:
    settings = CoordinatorSettings.model_validate({"classes": {"batch": {"priority": 5}, "gold": {}}})
    assert sorted(settings.classes) == ["batch", "gold", "interactive"]
    assert (settings.classes["batch"].priority, settings.classes["batch"].preemptible) == (5, True)
