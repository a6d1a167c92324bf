"""Service classes and tenants, as the configuration has them."""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import BeforeValidator, model_validator

from pdserve.core.settings import Frozen, Positive, PositiveInt, Seconds


class SlaClassSettings(Frozen):
    """What requests of a class want, where they do not say so themselves."""

    ttft_target_ms: Positive | None = None
    """From arrival to the first token."""
    tpot_target_ms: Positive | None = None
    """Mean time per token after the first."""
    tokens_per_second: Positive | None = None
    """The same, as a speed: give one of the two."""
    deadline_s: Seconds | None = None
    """A request that has not ended by then fails."""
    priority: int | None = None
    """Lower is more urgent; 0 where neither the request nor its class says."""
    preemptible: bool | None = None
    """May be interrupted by a more urgent request that would come too late otherwise, and goes on later with
    the tokens it has. No, where neither the model's class nor the coordinator's says."""
    queue_ttl_s: Seconds | None = None
    """Refused when it has waited this long without having begun; coordinator.queue_ttl_s by default."""

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        if self.tpot_target_ms is not None and self.tokens_per_second is not None:
            raise ValueError("give tpot_target_ms or tokens_per_second, not both")
        return self


class TenantSettings(Frozen):
    """What one tenant may use. A request of `n` samples counts n times."""

    weight: Positive = 1.0
    """Share of the tokens, against the other tenants that wait with the same priority."""
    max_requests_per_s: Positive | None = None
    """More are refused, once `burst_s` seconds' worth have come at once."""
    max_tokens_per_s: Positive | None = None
    """Prompt and answer together; an answer is counted by its expected length until it has ended."""
    burst_s: Seconds = 10.0
    """How many seconds' worth of the rates may come at once."""
    max_concurrent: PositiveInt | None = None
    """More running or waiting at the same time are refused."""
    max_queued: PositiveInt | None = None
    """More waiting at the same time are refused."""


STANDARD_CLASSES: Final = {
    "interactive": SlaClassSettings(priority=0),
    "batch": SlaClassSettings(priority=10, preemptible=True),
}


def _with_standard_classes(given: object) -> object:
    """What is given of `interactive` and `batch` is laid over what they are."""
    if not isinstance(given, dict):
        return given
    merged: dict[str, object] = {name: standard.model_dump() for name, standard in STANDARD_CLASSES.items()}
    for name, fields in given.items():
        standard = merged.get(name)
        laid_over = isinstance(standard, dict) and isinstance(fields, dict)
        merged[name] = {**standard, **fields} if laid_over else fields  # type: ignore[dict-item]
    return merged


Classes = Annotated[dict[str, SlaClassSettings], BeforeValidator(_with_standard_classes)]
