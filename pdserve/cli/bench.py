"""`pdserve bench`: how much load meets the targets, on servers that run or on ones made for it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Final, Self

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdserve.cli import bench_options as options
from pdserve.cli.access import access
from pdserve.cli.console import ERR, OUT, print_table
from pdserve.core.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.bench.load import Progress as LoadProgress
    from pdserve.bench.records import Trial
    from pdserve.bench.report.tables import Table as Figures
    from pdserve.bench.scenario import Scenario
    from pdserve.bench.suite import Run

bench_app = typer.Typer(
    help="Find how much load meets the targets; compare configurations, servers and runs.",
    invoke_without_command=True,
)

DEFAULT_OUT: Final = Path("out/sla")
_ON_TERMINAL: Final = 2
"""Tables that are printed; the page has all."""


@bench_app.callback()
def bench(
    context: typer.Context,
    scenario: options.ScenarioFile = None,
    address: options.Addresses = None,
    model: options.Model = None,
    rates: options.Rates = None,
    rounds: options.Rounds = None,
    duration: options.Duration = None,
    budget: options.Budget = None,
    slo: options.SloPreset = None,
    goal: options.Goal = None,
    seed: options.Seed = None,
    trace: options.Trace = None,
    endpoint_api_key: options.EndpointKey = None,
    out: options.Out = DEFAULT_OUT,
    png: options.Png = True,
) -> None:
    """Find the highest rate with 90/95/99% of requests inside their targets, and write a report.

    Without any option: serves the default model twice, disaggregated and colocated, on this machine, searches
    for a few minutes, and writes out/sla/report.html. Exit code 1: a system failed.
    """
    if context.invoked_subcommand is not None:
        return
    # Here, not at the top: numpy and gRPC take time to import, which `--help` should not.
    from pdserve.bench.scenario import Scenario, load_scenario, with_endpoint_key

    choices = options.Choices(
        addresses=address,
        model=model,
        rates=rates,
        rounds=rounds,
        duration_s=duration,
        budget_s=budget,
        slo=slo,
        goal=goal,
        seed=seed,
        trace=trace,
    )
    base = Scenario() if scenario is None else load_scenario(scenario)
    chosen = options.chosen(base, choices, str(scenario or "options"))
    run = _run(with_endpoint_key(chosen, endpoint_api_key), out, png=png)
    if any(system.failed for system in run.systems):
        raise typer.Exit(1)


@bench_app.command("compare")
def compare_command(
    a: Annotated[Path, typer.Argument(help="Folder (or results.json) of the run to compare with.")],
    b: Annotated[Path, typer.Argument(help="Folder (or results.json) of the new run.")],
    system_a: Annotated[str | None, typer.Option(help="Which system of A, where it has several.")] = None,
    system_b: Annotated[str | None, typer.Option(help="Which system of B.")] = None,
    alpha: Annotated[float, typer.Option(help="Chance of a false alarm.", min=0.0001, max=0.5)] = 0.05,
    min_effect: Annotated[
        float, typer.Option(help="Smaller differences are let pass: 0.03 is 3%.", min=0.0)
    ] = 0.03,
) -> None:
    """Say whether B is really slower than A. Exit code 1: it is.

    Both should be made with the same scenario, seed, --rates and --rounds (5 or more, better 8).
    """
    from pdserve.bench.compare import compare, select
    from pdserve.bench.report.files import read_results

    before = select(read_results(a), system_a, str(a))
    after = select(read_results(b), system_b or system_a, str(b))
    found = compare(before, after, alpha=alpha, min_effect=min_effect)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "B against A", "95% interval", "p", "pairs", "verdict"):
        table.add_column(column)
    colours = {"worse": "red", "better": "green"}
    for one in found.outcomes:
        colour = colours.get(one.change.value, "dim")
        table.add_row(
            one.metric,
            f"{one.effect:+.1%}",
            f"{one.low:+.1%} .. {one.high:+.1%}",
            f"{one.p:.3f}",
            str(one.num_pairs),
            f"[{colour}]{one.change.value}[/]",
        )
    OUT.print(table)
    unpaired = f", {found.num_unpaired} requests unpaired" if found.num_unpaired else ""
    OUT.print(
        f"[dim]{found.num_pairs} pairs in {found.num_units} units (each a {found.unit.value}){unpaired}[/]"
    )
    if found.unit.value != "round":
        OUT.print("[dim]few rounds: drift of the machine between the runs cannot be told from a change[/]")
    raise typer.Exit(1 if found.regressed else 0)


def _run(scenario: Scenario, out: Path, *, png: bool) -> Run:
    from pdserve.bench.report.html import headlines
    from pdserve.bench.report.png import is_available
    from pdserve.bench.report.tables import tables_of
    from pdserve.bench.report.write import write_report
    from pdserve.bench.suite import run_suite

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from error

    async def main() -> Run:
        task = asyncio.current_task()
        if task is not None:
            # As Ctrl-C: what was started is stopped.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with Display() as display:
            return await run_suite(scenario, out, display, access=access())

    try:
        run = asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    written = write_report(run, out, png=png)
    for figures in tables_of(run)[:_ON_TERMINAL]:
        _print(figures)
    for line in headlines(run):
        OUT.print(f"[bold]{escape(line)}[/]")
    OUT.print(f"written: {escape(str(written[0]))} and {len(written) - 1} more in {escape(str(out))}")
    if png and not is_available():
        OUT.print("[dim]no PNG files beside it: matplotlib is not installed (pip install matplotlib)[/]")
    return run


class Display:
    """Live progress: the trial that runs, and a line for each that ended."""

    def __init__(self) -> None:
        self._live = ERR.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[system]}[/]"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=ERR,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, system="")

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def say(self, text: str) -> None:
        if self._live:
            self._progress.reset(self._task, description=escape(text), total=None, system="")
        else:
            ERR.print(escape(text))

    def trial_began(self, system: str, rate: float, num_requests: int) -> None:
        text = f"{rate:.3g} requests/s"
        self._progress.reset(self._task, total=num_requests, description=text, system=escape(system))

    def progressed(self, system: str, progress: LoadProgress) -> None:
        waiting = progress.num_sent - progress.num_done
        failed = f", {progress.num_failed} failed" if progress.num_failed else ""
        text = f"{progress.num_done} done, {progress.num_met} inside, {waiting} in flight{failed}"
        self._progress.update(self._task, completed=progress.num_done, description=text)

    def trial_ended(self, trial: Trial) -> None:
        inside = f"{sum(trial.met)} of {len(trial.met)} inside ({trial.attainment:.0%})"
        ERR.print(f"{escape(trial.system):<12} {trial.rate:>7.3g} requests/s  {inside}")


def _print(figures: Figures) -> None:
    table = Table(title=figures.title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in figures.head:
        table.add_column(name, overflow="fold")
    for row in figures.rows:
        table.add_row(*map(escape, row))
    print_table(table)
    OUT.print()
