"""How a service is watched, planned and paid for: as the configuration has it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pdserve.core.settings import Frozen, PositiveInt, Seconds, off


class LogFormat(StrEnum):
    HUMAN = "human"
    JSON = "json"


class TraceExporter(StrEnum):
    NONE = "none"
    CONSOLE = "console"
    FILE = "file"
    OTLP_GRPC = "otlp_grpc"
    OTLP_HTTP = "otlp_http"


class LoggingSettings(Frozen):
    format: LogFormat = LogFormat.HUMAN
    """Of log files and of the terminal: json is one object per line, for log collectors."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Of log files."""
    requests: bool = True
    """A line for each step of each request, with its id, on the coordinator and on its workers."""


class TracingSettings(Frozen):
    exporter: TraceExporter = TraceExporter.NONE
    """Where spans go. The otlp exporters need `pip install pdserve[otel]`."""
    endpoint: str | None = None
    """Of an OTLP collector: http://localhost:4317 for gRPC, http://localhost:4318 for HTTP (to /v1/traces,
    unless it has a path); the exporter's own default when not given."""
    file: str | None = None
    """For exporter file: one span per line, as JSON."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of requests traced whose client sent no trace context; with one, the client has decided."""

    @model_validator(mode="after")
    def _has_file(self) -> Self:
        if self.exporter is TraceExporter.FILE and self.file is None:
            raise ValueError("exporter file needs tracing.file")
        return self


class PlannerMode(StrEnum):
    """off: nothing is planned. advisory: proposals are shown. active: they are also carried out."""

    OFF = "off"
    ADVISORY = "advisory"
    ACTIVE = "active"


class PlannerSettings(Frozen):
    mode: Annotated[PlannerMode, BeforeValidator(off)] = PlannerMode.ADVISORY
    """off; advisory: propose how many workers of each role the load wants, see `pdserve plan`; active: also
    change the roles of workers, and add and retire some within the limits below."""
    budget_workers: PositiveInt | None = None
    """Workers of a model at most. Without it, a budget of devices or a maximum, none are added or retired."""
    budget_devices: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """GPUs (cores, where workers compute on CPUs) that the workers of all models may take together."""
    min_prefill: PositiveInt = 1
    """Prefill workers of a model that are always kept."""
    max_prefill: PositiveInt | None = None
    """Prefill workers of a model at most; nothing: as the budgets allow, and none are added without one. The
    cores of a machine of our own are divided among as many workers as there may be."""
    min_decode: PositiveInt = 1
    """Decode workers of a model that are always kept."""
    max_decode: PositiveInt | None = None
    """Decode workers of a model at most, as `max_prefill`."""
    place_timeout_s: Seconds = 600.0
    """How long a worker that is added waits for room, in which Ray's autoscaler may bring a node; then it is
    given up."""
    interval_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """Between two plans, and what demand is counted in."""
    dwell_s: Seconds = 60.0
    """Between two changes at least."""
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Part of the requests that a change must bring in time, beyond its own uncertainty."""
    season_s: Annotated[float, Field(ge=0)] = 0.0
    """After which the load repeats, 86400 for a day; 0: it is not known to."""

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        for role, least, most in (
            ("prefill", self.min_prefill, self.max_prefill),
            ("decode", self.min_decode, self.max_decode),
        ):
            if most is not None and least > most:
                raise ValueError(f"min_{role} is {least}, max_{role} is {most}")
        return self


class CostSettings(Frozen):
    currency: str = "USD"
    """Name of the money that prices are in."""
    device_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of a GPU (of a core, for workers on CPUs) for an hour; 0: only time is counted."""
    prefill_device_hour: Annotated[float, Field(ge=0)] | None = None
    """Of prefill workers, where they run on other machines; device_hour by default."""
    kv_gib_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of a GiB of KV held on a decode worker for an hour, besides its device."""

    @property
    def prefill_hour(self) -> float:
        """Price of a prefill worker's device for an hour."""
        return self.device_hour if self.prefill_device_hour is None else self.prefill_device_hour
