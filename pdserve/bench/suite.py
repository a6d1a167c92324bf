"""A whole run: every system in turn, trial by trial, so that a slow minute of the machine hits all."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from pdserve.bench.duration import before_all, long_enough, longest_run_s, longest_trial_s
from pdserve.bench.environment import Environment, describe_environment
from pdserve.bench.load import Progress, run_trial
from pdserve.bench.records import Trial
from pdserve.bench.scenario import Scenario, Search, SystemSpec
from pdserve.bench.search import Goodput, GoodputSearch, Point, at_least
from pdserve.bench.servers import Server, serving
from pdserve.bench.traces import TraceRow, read_trace
from pdserve.bench.workload import ServerLimits, build_workload
from pdserve.client import Access
from pdserve.core.errors import PdServeError

COMMON_ROUND: Final = 1_000_000
"""The round number of the last trials of a search, at one rate for all systems."""
_WARM_UP_SEED: Final = 999_983


class Observer(Protocol):
    """Told how a run goes."""

    def say(self, text: str) -> None: ...

    def trial_began(self, system: str, rate: float, num_requests: int) -> None: ...

    def progressed(self, system: str, progress: Progress) -> None: ...

    def trial_ended(self, trial: Trial) -> None: ...


@dataclass(slots=True, kw_only=True)
class SystemResult:
    name: str
    prefill: int | None
    """Workers, of a pdserve started here."""
    decode: int | None
    command: tuple[str, ...]
    address: str
    units: float | None
    unit: str
    price_per_unit_hour: float | None
    points: list[Point] = field(default_factory=list)
    goodputs: list[Goodput] = field(default_factory=list)
    failed: str = ""
    """Why it was given up."""


@dataclass(slots=True, kw_only=True)
class Run:
    scenario: Scenario
    environment: Environment
    systems: list[SystemResult]
    trials: list[Trial]
    wall_s: float = 0.0

    def trials_of(self, system: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.system == system]

    def common_trials(self) -> list[Trial]:
        """All systems at the same rate: the last of a search, else the highest rate that was measured."""
        common = [trial for trial in self.trials if trial.round == COMMON_ROUND]
        if common:
            return common
        highest = max((trial.rate for trial in self.trials), default=0.0)
        return [trial for trial in self.trials if trial.rate == highest]


async def run_suite(
    scenario: Scenario, out: Path, observer: Observer, *, access: Access | None = None
) -> Run:
    """Start what must be started, measure, stop it. A system that fails is left out from then on.

    access: key and certificates for gRPC servers that were running.
    Raises a `PdServeError` when a server cannot be reached, none can be started, or the trace cannot be read.
    """
    began_s = time.perf_counter()
    trace = await asyncio.to_thread(read_trace, scenario.replay.path) if scenario.replay else []
    run = Run(scenario=scenario, environment=describe_environment(), systems=[], trials=[])
    async with contextlib.AsyncExitStack() as stack:
        servers: list[Server] = []
        for spec in scenario.systems:
            starts = bool(spec.command) or spec.address is None
            observer.say(f"{'starting' if starts else 'connecting to'} {spec.name}")
            try:
                server = await stack.enter_async_context(serving(spec, out / "logs", access))
            except PdServeError as error:
                # Those that are up are worth their time; a wrong address is better said at once.
                if not starts or (not servers and spec is scenario.systems[-1]):
                    raise
                observer.say(f"{spec.name} did not start: {error}")
                run.systems.append(_never_started(spec, error))
                continue
            server.freeze()
            servers.append(server)
            run.systems.append(_describe(server))
        measurement = _Measurement(run, servers, trace, observer)
        observer.say(f"measuring: at most {longest_run_s(scenario) / 60:.1f} minutes")
        await measurement.warm_up()
        if scenario.rates:
            await measurement.sweep()
        else:
            await measurement.search()
        observer.say("stopping")
    run.wall_s = time.perf_counter() - began_s
    return run


class _Measurement:
    def __init__(
        self, run: Run, servers: Sequence[Server], trace: Sequence[TraceRow], observer: Observer
    ) -> None:
        self._run, self._scenario, self._trace, self._observer = run, run.scenario, trace, observer
        self._servers = list(servers)
        self._began_s = time.perf_counter()
        self._salt = time.time_ns() if run.scenario.fresh_prompts else 0
        # One workload for all: what the smallest can take.
        self._limits = ServerLimits(
            vocab_size=min(server.limits.vocab_size for server in servers),
            max_model_len=min(server.limits.max_model_len for server in servers),
        )

    async def warm_up(self) -> None:
        """First transfers, connections and caches: not measured."""
        short = before_all(self._scenario)
        rate = min(self._scenario.rates, default=self._scenario.search.start_rate)
        for server in self._turns(0):
            self._observer.say(f"warming up {server.spec.name}")
            await self._trial(server, rate, _WARM_UP_SEED, scenario=short, keep=False)

    async def sweep(self) -> None:
        """Every rate in every round, every system at each."""
        searches = {result.name: GoodputSearch(self._scenario.search) for result in self._run.systems}
        for round in range(self._scenario.rounds):
            for rate in self._scenario.rates:
                for server in self._turns(round):
                    trial = await self._trial(server, rate, round)
                    if trial is not None:
                        searches[trial.system].tell(rate, trial.met, trial.wall_s)
        self._conclude(searches)

    async def search(self) -> None:
        """Each system's own search, a trial each in turn; then all at one rate."""
        searches = {result.name: GoodputSearch(self._scenario.search) for result in self._run.systems}
        tried: dict[tuple[str, float], int] = {}
        for turn in range(1_000_000):
            asked = False
            for server in self._turns(turn):
                name = server.spec.name
                rate = searches[name].next_rate()
                if rate is None or not self._is_time_for(rate, searches[name]):
                    continue
                asked = True
                repeat = tried[name, rate] = tried.get((name, rate), -1) + 1
                before_s = time.perf_counter()
                trial = await self._trial(server, rate, repeat)
                if trial is not None:
                    searches[name].tell(rate, trial.met, time.perf_counter() - before_s)
            if not asked or not self._servers:
                break
        self._conclude(searches)
        await self._at_a_common_rate(searches)

    def _is_time_for(self, rate: float, search: GoodputSearch) -> bool:
        """The budget holds, whatever the answers take; but one trial there must be."""
        left_s = self._scenario.search.budget_s - search.spent_s
        return search.spent_s == 0 or longest_trial_s(self._scenario, rate) <= left_s

    async def _at_a_common_rate(self, searches: dict[str, GoodputSearch]) -> None:
        goal = self._scenario.search.goal
        mine = [searches[server.spec.name] for server in self._servers]
        found = [at_least(search.estimate(goal), search.points()) for search in mine]
        rates = [rate for rate in found if rate is not None]
        if rates:
            for server in self._turns(0):
                await self._trial(server, min(rates), COMMON_ROUND)

    def _conclude(self, searches: dict[str, GoodputSearch]) -> None:
        settings: Search = self._scenario.search
        for result in self._run.systems:
            search = searches[result.name]
            result.points = search.points()
            wanted = sorted({*settings.attainment, settings.goal})
            result.goodputs = [search.estimate(goal) for goal in wanted] if result.points else []

    def _turns(self, number: int) -> list[Server]:
        """Who is left, beginning with another one each time."""
        count = len(self._servers)
        return [self._servers[(number + index) % count] for index in range(count)]

    async def _trial(
        self, server: Server, rate: float, round: int, *, scenario: Scenario | None = None, keep: bool = True
    ) -> Trial | None:
        """None when the system failed altogether; it is left out then."""
        scenario = scenario or long_enough(self._scenario, rate)
        name = server.spec.name
        workload = build_workload(scenario, rate, round, self._limits, trace=self._trace, salt=self._salt)
        self._observer.trial_began(name, rate, sum(len(s.turns) for s in workload.sessions))
        server.thaw()
        try:
            trial = await run_trial(
                server.driver,
                workload,
                system=name,
                rate=rate,
                round=round,
                drain_s=scenario.drain_s,
                started_s=time.perf_counter() - self._began_s,
                watch=lambda progress: self._observer.progressed(name, progress),
            )
            gone = await self._why_gone(server, trial)
        finally:
            server.freeze()
        if keep:
            self._run.trials.append(trial)
            self._observer.trial_ended(trial)
        if gone:
            self._observer.say(f"{name} failed: {gone}")
            self._servers.remove(server)
            next(result for result in self._run.systems if result.name == name).failed = gone
            return None
        return trial

    async def _why_gone(self, server: Server, trial: Trial) -> str:
        """Why no request got an answer, when the server does not even say its models any more."""
        if not trial.records or any(record.token_times_s for record in trial.records):
            return ""
        errors = [record.error_text for record in trial.records if record.error not in (None, "cut")]
        if not errors:
            return ""
        try:
            await server.driver.limits()
        except PdServeError as error:
            return str(error)
        # It lives, and refuses everything: for overload that is an answer, for bad requests it is not.
        kinds = {record.error for record in trial.records} - {"cut", "Overloaded", "NoWorkers", "WorkerLost"}
        return errors[0] if kinds and len(errors) == len(trial.records) else ""


def _never_started(spec: SystemSpec, why: PdServeError) -> SystemResult:
    return SystemResult(
        name=spec.name,
        prefill=None,
        decode=None,
        command=spec.command,
        address=spec.address or "",
        units=spec.units,
        unit=spec.unit,
        price_per_unit_hour=spec.price_per_unit_hour,
        failed=str(why),
    )


def _describe(server: Server) -> SystemResult:
    spec, started = server.spec, server.spec.address is None
    return SystemResult(
        name=spec.name,
        prefill=spec.prefill if started else None,
        decode=spec.decode if started else None,
        # Without this machine's paths.
        command=("pdserve", *server.command[3:]) if started else server.command,
        address=server.address,
        units=server.units,
        unit=spec.unit,
        price_per_unit_hour=spec.price_per_unit_hour,
    )
