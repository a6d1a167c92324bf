"""What the commands print: progress with words for everything that takes time, and errors in one line."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pdserve.core.logs import HumanFormatter

OUT: Final = Console(highlight=False, soft_wrap=True)
"""Answers and tables: what a pipe should get."""
ERR: Final = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, summaries and errors."""

_LINE_EVERY_S: Final = 2.0
_WIDTH_OF_FILES: Final = 160


def print_table(table: Table) -> None:
    """As wide as the terminal; a file or a pipe has no width of its own: lines are not folded there."""
    (OUT if OUT.is_terminal else Console(highlight=False, width=_WIDTH_OF_FILES)).print(table)


def fail(message: str) -> None:
    """One line on stderr: the reader should know what to change."""
    first, *rest = message.strip().splitlines() or ["failed"]
    ERR.print(f"[bold red]pdserve:[/] {escape(first)}")
    for line in rest:
        ERR.print(f"  {escape(line)}")


def log_handler() -> logging.Handler:
    """In colours and folded on a terminal; elsewhere a record is one line, with its time: journals and `grep`
    go by lines."""
    if ERR.is_terminal:
        return RichHandler(console=ERR, show_path=False, markup=False)
    handler = logging.StreamHandler()
    handler.setFormatter(HumanFormatter("pdserve"))
    return handler


class Reporter:
    """Progress of several things at once: bars that move on a terminal, a line now and then elsewhere.

    Calling it says what is going on; `with` ends the display. The bars vanish when done, so that what is
    printed afterwards starts on a clean line.
    """

    def __init__(self) -> None:
        self._live = ERR.is_terminal
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("[bold]{task.fields[what]}[/]"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=ERR,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the display; more calls start none."""
        if self._live:
            self._progress.stop()
        self._live = False

    def __call__(self, what: str, text: str, fraction: float | None = None) -> None:
        """Say that `what` is at `text`; a `fraction` in [0, 1] moves its bar, None lets it pulse."""
        if self._live:
            self._move(what, text, fraction)
        elif (now := time.monotonic()) - self._said.get(what, -_LINE_EVERY_S) >= _LINE_EVERY_S:
            ERR.print(f"{what}: {escape(text)}")
            self._said[what] = now

    def _move(self, what: str, text: str, fraction: float | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(text, total=None, what=what)
        self._progress.update(
            self._tasks[what],
            description=escape(text),
            total=None if fraction is None else 1.0,
            completed=fraction or 0.0,
        )


def write_answer(text: str) -> None:
    """A piece of a streamed answer, at once and as it is: no markup, no wrapping."""
    sys.stdout.write(text)
    sys.stdout.flush()
