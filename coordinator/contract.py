"""What a request was promised: its own targets, else its class's: the model's, before the coordinator's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pdserve.core.errors import InvalidRequest
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sla_settings import SlaClassSettings

MAX_TARGET_MS: Final = 86_400_000.0
_NO_CLASS: Final = SlaClassSettings()

Classes = Mapping[str, SlaClassSettings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """Times in seconds. None: not asked for."""

    sla_class: str = ""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    deadline_s: float | None = None
    priority: int = 0
    preemptible: bool = False
    """May be interrupted, and go on later, to make room for a more urgent request."""
    queue_ttl_s: float | None = None


def resolve(
    request: pb.GenerateRequest, classes: Classes, of_model: Classes, default_class: str | None
) -> Contract:
    """Raises `InvalidRequest` for a class that there is not, or a target that is no time."""
    name = request.sla_class or default_class or ""
    known = classes.keys() | of_model.keys()
    if name and name not in known:
        raise InvalidRequest(field="sla_class", value=name, limit=f"one of {', '.join(sorted(known))}")
    wanted = _laid_over(of_model.get(name, _NO_CLASS), classes.get(name, _NO_CLASS))
    tpot_s = _tpot_s(request)
    if tpot_s is None:
        tpot_s = _class_tpot_s(wanted)
    return Contract(
        sla_class=name,
        ttft_target_s=_first(_seconds(request, "ttft_target_ms"), _from_ms(wanted.ttft_target_ms)),
        tpot_target_s=tpot_s,
        deadline_s=_first(_seconds(request, "deadline_ms"), wanted.deadline_s),
        priority=request.priority if request.HasField("priority") else wanted.priority or 0,
        preemptible=bool(wanted.preemptible),
        queue_ttl_s=wanted.queue_ttl_s,
    )


def _laid_over(upper: SlaClassSettings, lower: SlaClassSettings) -> SlaClassSettings:
    """What `upper` leaves open is `lower`'s; a speed of either kind stands for both."""
    given = {key: value for key, value in upper if value is not None}
    if "tpot_target_ms" in given or "tokens_per_second" in given:
        lower = lower.model_copy(update={"tpot_target_ms": None, "tokens_per_second": None})
    return lower.model_copy(update=given)


def _tpot_s(request: pb.GenerateRequest) -> float | None:
    if not request.HasField("tokens_per_second"):
        return _seconds(request, "tpot_target_ms")
    speed = request.tokens_per_second
    if request.HasField("tpot_target_ms"):
        limit = "left out where tpot_target_ms is given"
        raise InvalidRequest(field="tokens_per_second", value=speed, limit=limit)
    if not 1e3 / MAX_TARGET_MS <= speed <= 1e9:  # False for NaN too
        raise InvalidRequest(field="tokens_per_second", value=speed, limit="above 0, and a speed")
    return 1 / speed


def _class_tpot_s(wanted: SlaClassSettings) -> float | None:
    if wanted.tokens_per_second is not None:
        return 1 / wanted.tokens_per_second
    return _from_ms(wanted.tpot_target_ms)


def _seconds(request: pb.GenerateRequest, field: str) -> float | None:
    if not request.HasField(field):  # type: ignore[arg-type]  # the stubs want a literal
        return None
    value: float = getattr(request, field)
    if not 0.0 < value <= MAX_TARGET_MS:  # False for NaN too
        raise InvalidRequest(field=field, value=value, limit=f"in (0, {MAX_TARGET_MS:g}] milliseconds")
    return value / 1e3


def _from_ms(value: float | None) -> float | None:
    return None if value is None else value / 1e3


def _first(own: float | None, of_class: float | None) -> float | None:
    return of_class if own is None else own
