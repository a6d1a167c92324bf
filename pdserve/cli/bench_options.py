"""Options of `pdserve bench`, and what they make of a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer
from pydantic import BaseModel

from pdserve.core.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.bench.scenario import Replay, RequestClass, Scenario, SystemSpec

_CHAT: Final = "/chat/completions"
Section = TypeVar("Section", bound=BaseModel)

ScenarioFile = Annotated[
    Path | None, typer.Option("--scenario", "-s", help="YAML file; see benchmarks/sla.", metavar="FILE")
]
Addresses = Annotated[
    list[str] | None,
    typer.Option(
        "--address",
        "-a",
        help="Measure this server instead: host:port or grpcs://host:port (gRPC), http://host:port "
        "(OpenAI completions), http://host:port/v1/chat/completions (chat); may be repeated.",
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="What to serve, or to ask the servers for.")]
Rates = Annotated[
    str | None, typer.Option(help="Measure at these requests per second, as 1,2,4; else search.")
]
Rounds = Annotated[int | None, typer.Option(help="With --rates: turns of each system.")]
Duration = Annotated[float | None, typer.Option(help="Seconds of arrivals per trial.")]
Budget = Annotated[float | None, typer.Option(help="Seconds of search per system.")]
SloPreset = Annotated[
    str | None, typer.Option(help="A preset for all classes, such as mlperf-llama2-70b-interactive.")
]
Goal = Annotated[float | None, typer.Option(help="Part of requests inside targets to search for.")]
Seed = Annotated[int | None, typer.Option(help="The same seed sends the same requests.")]
Trace = Annotated[
    Path | None, typer.Option(help="Replay this trace (Azure .csv, Mooncake .jsonl).", metavar="FILE")
]
EndpointKey = Annotated[
    str | None,
    typer.Option(
        envvar="PDSERVE_ENDPOINT_API_KEY",
        help="Key for OpenAI endpoints. Keys and certificates for gRPC servers go before the command: "
        "pdserve --api-key KEY bench ...",
        metavar="KEY",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")]
Png = Annotated[bool, typer.Option(help="PNG files of the plots too, with matplotlib.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the command line says beyond the scenario; None: nothing."""

    addresses: list[str] | None = None
    model: str | None = None
    rates: str | None = None
    rounds: int | None = None
    duration_s: float | None = None
    budget_s: float | None = None
    slo: str | None = None
    goal: float | None = None
    seed: int | None = None
    trace: Path | None = None


def chosen(base: Scenario, choices: Choices, where: str) -> Scenario:
    """The scenario with the choices in place of its own. Raises `ConfigError` for impossible ones."""
    from pdserve.bench.scenario import parse_scenario

    search = _with(base.search, budget_s=choices.budget_s, goal=choices.goal)
    changed = _with(
        base,
        systems=_systems(base, choices),
        replay=_replay(base, choices.trace),
        rates=_rates(choices.rates),
        rounds=choices.rounds,
        duration_s=choices.duration_s,
        seed=choices.seed,
        search=None if search is base.search else search,
        classes=_classes(base, choices.slo),
    )
    # Copies are not checked: all of it is, once more.
    return parse_scenario(changed.model_dump(exclude_unset=True), where)


def _with(section: Section, **changes: object) -> Section:
    """A copy with those that were given."""
    given = {name: value for name, value in changes.items() if value is not None}
    return section.model_copy(update=given) if given else section


def _systems(base: Scenario, choices: Choices) -> tuple[SystemSpec, ...] | None:
    if choices.addresses:
        return tuple(_system(address, choices.model) for address in choices.addresses)
    if choices.model is None:
        return None
    return tuple(_with(system, model=choices.model) for system in base.systems)


def _system(address: str, model: str | None) -> SystemSpec:
    from pdserve.bench.scenario import Endpoint, Protocol, SystemSpec

    if not address.startswith(("http://", "https://")):
        return SystemSpec(name=address, address=address, model=model)
    bare = address.rstrip("/").removesuffix(_CHAT)
    chat = bare != address.rstrip("/")
    return SystemSpec(
        name=address,
        address=bare,
        protocol=Protocol.OPENAI,
        endpoint=Endpoint.CHAT if chat else Endpoint.COMPLETIONS,
        model=model,
    )


def _replay(base: Scenario, trace: Path | None) -> Replay | None:
    from pdserve.bench.scenario import Replay

    if trace is None:
        return None
    return Replay(path=trace) if base.replay is None else _with(base.replay, path=trace)


def _classes(base: Scenario, slo: str | None) -> tuple[RequestClass, ...] | None:
    from pdserve.bench.scenario import RequestClass
    from pdserve.bench.slo import preset

    if slo is None:
        return None
    preset(slo)
    return tuple(
        RequestClass.model_validate(one.model_dump(exclude_unset=True, exclude={"slo"}) | {"slo_preset": slo})
        for one in base.classes
    )


def _rates(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--rates {text}: wanted numbers, such as 1,2,4") from None
