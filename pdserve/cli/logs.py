"""`pdserve logs REQUEST`: every line of a request on all machines, of whatever process, in order of time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from pdserve.cli.console import ERR
from pdserve.core.errors import ConfigError

_ROOT: Final = Path("/tmp")
_FOLDERS: Final = ("pdserve-*/ray/session_*/logs", "ray/session_*/logs")
"""Of clusters that pdserve started, and of those that it joined."""
_FILES: Final = ("pdserve-coordinator.log", "worker-*.err", "worker-*.out")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")

Found = tuple[str, str]
"""(where it belongs among the others, line)."""


def logs(
    request: Annotated[str, typer.Argument(help="A request's id, or an attempt's.")],
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Only the logs in this folder; no other machine is asked."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="HOST:PORT",
            envvar="RAY_ADDRESS",
            help="Head of the Ray cluster whose machines are asked; else the one this machine is part of.",
        ),
    ] = None,
) -> None:
    """Show every log line of a request, from the coordinator and all workers, on all machines."""
    if not request.strip():
        raise typer.BadParameter("which request? `pdserve explain last` shows the last one's id")
    folders = [folder] if folder is not None else sorted(_session_folders())
    found = {line for each in folders for line in lines_of(request, each)}
    where = [str(each) for each in folders]
    if folder is None:
        where += _on_other_machines(request, cluster, found)
    for _, line in sorted(found):
        typer.echo(line)
    if not found:
        ERR.print(f"no line about {request} in {', '.join(where) or 'any session on this machine'}")
        raise typer.Exit(1)


def lines_of(request: str, folder: Path) -> Iterator[Found]:
    """Of the files of one session's folder."""
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        yield from lines_about(request, path.name, path.read_text(errors="replace").splitlines())


def lines_about(request: str, name: str, lines: Iterable[str]) -> Iterator[Found]:
    """Each line of the file called `name` about a request, its samples or an attempt.

    What has no time of its own belongs to the line before it, as a traceback does.
    """
    mine = re.compile(rf"(?<![\w.-]){re.escape(request)}(?![\w-])")
    at, ours, number = "", False, 0
    for line in lines:
        moment = _moment(line)
        if moment:
            at, ours, number = moment, bool(mine.search(line)), 0
        if ours:
            # A number keeps the lines of a traceback in order.
            yield f"{at} {name} {number:05d}", line
            number += 1


def _on_other_machines(request: str, cluster: str | None, found: set[Found]) -> list[str]:
    """Adds to `found`; returns what was searched. Our own machine's lines come again, and are the same."""
    # Here, not at the top: Ray takes a second to import.
    from pdserve.cluster.node_logs import cluster_here, lines_in, node_files

    address = cluster or cluster_here()
    if address is None:
        return []
    asked: set[str] = set()
    for file in node_files(address, _FILES):
        if isinstance(file, str):
            ERR.print(f"a machine does not tell its logs: {file}")
            continue
        asked.add(file.node_ip)
        try:
            found.update(lines_about(request, file.name, lines_in(address, file)))
        except ConfigError as error:  # the others may have the lines
            ERR.print(str(error))
    return sorted(asked)


def _moment(line: str) -> str:
    if line.startswith("{"):
        try:
            return str(json.loads(line).get("ts", ""))
        except ValueError:
            return ""
    found = _TIME.match(line)
    return found.group() if found else ""


def _session_folders() -> Iterator[Path]:
    seen: set[Path] = set()
    for pattern in _FOLDERS:
        for path in _ROOT.glob(pattern):
            real = path.resolve()
            if real not in seen and real.is_dir():
                seen.add(real)
                yield real
