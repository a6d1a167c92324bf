"""`pdserve logs REQUEST`: every line of a request on this machine, of whatever process, in order of time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from pdserve.cli.console import ERR

_ROOT: Final = Path("/tmp")
_FOLDERS: Final = ("pdserve-*/ray/session_*/logs", "ray/session_*/logs")
"""Of clusters that pdserve started, and of those that it joined."""
_FILES: Final = ("pdserve-coordinator.log", "worker-*.err", "worker-*.out")
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")


def logs(
    request: Annotated[str, typer.Argument(help="A request's id, or an attempt's.")],
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the logs are; all sessions on this machine by default."),
    ] = None,
) -> None:
    """Show every log line of a request, from the coordinator and all workers of this machine."""
    folders = [folder] if folder is not None else sorted(_session_folders())
    found = sorted({line for each in folders for line in lines_of(request, each)})
    for _, line in found:
        typer.echo(line)
    if not found:
        ERR.print(
            f"no line about {request} in {', '.join(map(str, folders)) or 'any session on this machine'}"
        )
        raise typer.Exit(1)


def lines_of(request: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(time, line) of each line about a request, its samples or an attempt.

    What has no time of its own belongs to the line before it, as a traceback does.
    """
    mine = re.compile(rf"(?<![\w.-]){re.escape(request)}(?![\w-])")
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        at, ours = "", False
        number = 0
        for line in path.read_text(errors="replace").splitlines():
            moment = _moment(line)
            if moment:
                at, ours, number = moment, bool(mine.search(line)), 0
            if ours:
                # A number keeps the lines of a traceback in order.
                yield f"{at} {path.name} {number:05d}", line
                number += 1


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
