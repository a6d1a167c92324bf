"""A scenario file: the work, its targets, the systems to compare, and how long to look."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, JsonValue, ValidationError, model_validator

from pdserve.bench.arrivals import Arrivals
from pdserve.bench.distributions import Frozen, LengthKind, Lengths
from pdserve.bench.slo import PRESETS, Slo
from pdserve.core.errors import ConfigError


class Protocol(StrEnum):
    GRPC = "grpc"
    OPENAI = "openai"


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


class Sessions(Frozen):
    """Conversations: a turn's prompt is everything said before, then new text."""

    turns: Lengths = Lengths(kind=LengthKind.FIXED, value=1)
    think_s: float = Field(default=1.0, ge=0)
    """From the end of an answer to the next turn (mean; exponential)."""


class RequestClass(Frozen):
    name: str = "default"
    weight: float = Field(default=1.0, gt=0)
    """Its share of the arrivals, relative to the other classes'."""
    input: Lengths = Lengths(kind=LengthKind.LOGNORMAL, value=96, sigma=0.5, min=16, max=384)
    """Tokens of a prompt; of each turn's new text in a session."""
    output: Lengths = Lengths(kind=LengthKind.LOGNORMAL, value=24, sigma=0.4, min=4, max=64)
    shared_prefix: int = Field(default=0, ge=0)
    """So many tokens at the start of every prompt are the same (a system prompt)."""
    sessions: Sessions = Sessions()
    slo: Slo = PRESETS["mlperf-llama2-70b"]
    slo_preset: str | None = None
    """A name of a preset instead of `slo`."""
    priority: int = 0
    """Sent to pdserve; lower is more urgent."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.slo_preset is not None and self.slo_preset not in PRESETS:
            raise ValueError(f"slo_preset {self.slo_preset!r} is not one of {', '.join(PRESETS)}")
        if self.slo_preset is not None and "slo" in self.model_fields_set:
            raise ValueError("give slo or slo_preset, not both")
        return self

    @property
    def targets(self) -> Slo:
        return self.slo if self.slo_preset is None else PRESETS[self.slo_preset]


class Replay(Frozen):
    """Recorded traffic instead of `arrivals` and the classes' lengths; the first class's SLO holds."""

    path: Path
    length_scale: float = Field(default=1.0, gt=0)
    """All lengths, and the size of a shared prefix block, are multiplied by this."""
    max_input: int = Field(default=1_000_000, ge=1)
    max_output: int = Field(default=1_000_000, ge=1)
    """Longer ones are clipped; the report says how many were."""


class SystemSpec(Frozen):
    """A server to measure: one that is running (`address`), one to start (`command`), or a pdserve."""

    name: str
    address: str | None = None
    """host:port of gRPC (grpcs://host:port: TLS), or the http:// address of an OpenAI-compatible server."""
    protocol: Protocol = Protocol.GRPC
    endpoint: Endpoint = Endpoint.COMPLETIONS
    """OpenAI: /v1/completions with token ids, or /v1/chat/completions with made-up words."""
    prefill_address: str | None = None
    """OpenAI: the prefill instance of a vLLM pair. Each request goes there first, as vLLM's proxy does it."""
    command: tuple[str, ...] = ()
    """What starts the server at `address`; it is told to stop (SIGTERM) when the run ends."""
    freeze: bool = False
    """Its processes are stopped (SIGSTOP) while others have their turn. Not for servers that watch the clock
    of their own parts, as pdserve does."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    model: str | None = None
    """What to ask for, or (without address) to serve."""
    prefill: int = Field(default=1, ge=0)
    decode: int = Field(default=1, ge=1)
    settings: tuple[str, ...] = ()
    """`section.key=value` for `pdserve serve --set`."""
    api_key: str | None = Field(default=None, repr=False)
    """In no report. Better than in a file: `--api-key` and `--endpoint-api-key`."""
    ca_file: Path | None = None
    """TLS: the authority (PEM) of its certificate, if the system does not know it."""
    text_prompts: bool = False
    """OpenAI completions: send words, not token ids."""
    vocab_size: int = Field(default=32000, ge=64)
    """OpenAI: prompts are made of token ids below this. (gRPC servers say it themselves.)"""
    extra_body: Mapping[str, JsonValue] = Field(default={"ignore_eos": True})
    """OpenAI: more fields of every request. Without ignore_eos answers have the length the model wants."""
    units: float | None = Field(default=None, gt=0)
    """How many cores or GPUs it has; of one started here: the cores of this machine."""
    unit: str = "core"
    price_per_unit_hour: float | None = Field(default=None, gt=0)
    """What one of them costs, in any currency."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        is_http = (self.address or "").startswith(("http://", "https://"))
        if self.address is None and (self.protocol is not Protocol.GRPC or self.command):
            raise ValueError(f"system {self.name}: give the address it is at")
        if self.protocol is Protocol.OPENAI and not is_http:
            raise ValueError(f"system {self.name}: an OpenAI address begins with http:// or https://")
        if self.protocol is not Protocol.OPENAI and (
            self.prefill_address or "endpoint" in self.model_fields_set
        ):
            raise ValueError(f"system {self.name}: endpoint and prefill_address are of protocol openai")
        if self.freeze and not self.command:
            raise ValueError(f"system {self.name}: only what is started by a command here can be frozen")
        return self


class Search(Frozen):
    """How to look for the highest rate at which targets are met."""

    attainment: tuple[float, ...] = (0.90, 0.95, 0.99)
    """Parts of all requests that must meet their targets; the search goes for `goal`, all are reported."""
    goal: float = Field(default=0.90, gt=0, lt=1)
    start_rate: float = Field(default=2.0, gt=0)
    precision: float = Field(default=0.08, gt=0, lt=1)
    """Stop when the bracket is this narrow, relative to the rate."""
    max_rate: float = Field(default=10_000.0, gt=0)
    budget_s: float = Field(default=150.0, gt=0)
    """Per system, over the trials of its search: none begins that could end later."""

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        if not self.attainment or not all(0 < a < 1 for a in self.attainment):
            raise ValueError("attainment: each must be between 0 and 1")
        return self


class Scenario(Frozen):
    name: str = "default"
    seed: int = Field(default=0, ge=0)
    fresh_prompts: bool = True
    """Prompts say something else in every run, at the same times and lengths: a server that stays up cannot
    have them in its prefix cache."""
    arrivals: Arrivals = Arrivals()
    classes: tuple[RequestClass, ...] = (RequestClass(),)
    replay: Replay | None = None
    systems: tuple[SystemSpec, ...] = (
        SystemSpec(name="1P1D", prefill=1, decode=1),
        SystemSpec(name="colocated", prefill=0, decode=1),
    )
    search: Search = Search()
    rates: tuple[float, ...] = ()
    """Requests per second to measure at, every system in every round; empty: search."""
    rounds: int = Field(default=1, ge=1)
    """With `rates`: how often every system has its turn at each."""
    duration_s: float = Field(default=15.0, gt=0)
    """Of one trial's arrivals."""
    min_requests: int = Field(default=30, ge=1)
    """A trial at a low rate goes on until it has about so many, at most three times its duration."""
    warmup_s: float = Field(default=2.0, ge=0)
    """Arrivals before it, which are not counted."""
    drain_s: float = Field(default=10.0, gt=0)
    """What is not answered so long after the last arrival is cut, and misses its targets."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.classes or not self.systems:
            raise ValueError("at least one class and one system are needed")
        for what, names in (
            ("class", [c.name for c in self.classes]),
            ("system", [s.name for s in self.systems]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"two {what} entries have the same name")
        if any(rate <= 0 for rate in self.rates):
            raise ValueError("rates must be above 0")
        return self


def load_scenario(path: Path) -> Scenario:
    """Raises `ConfigError` naming the file and the key. A relative trace path is beside the file."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"scenario {path}: {' '.join(str(error).split())}") from error
    scenario = parse_scenario(raw, str(path))
    if scenario.replay is None or scenario.replay.path.is_absolute():
        return scenario
    beside = scenario.replay.model_copy(update={"path": path.parent / scenario.replay.path})
    return scenario.model_copy(update={"replay": beside})


def parse_scenario(raw: object, where: str) -> Scenario:
    try:
        return Scenario.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"scenario {where}: {key + ': ' if key else ''}{first['msg']}") from error


def with_endpoint_key(scenario: Scenario, key: str | None) -> Scenario:
    """The key for OpenAI systems that have none of their own. It goes to none of the others."""
    if key is None:
        return scenario
    systems = tuple(
        one.model_copy(update={"api_key": key})
        if one.protocol is Protocol.OPENAI and one.api_key is None
        else one
        for one in scenario.systems
    )
    return scenario.model_copy(update={"systems": systems})
