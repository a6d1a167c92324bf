"""Log lines of every process in one shape, for people or for machines.

    2026-11-20T17:40:01.123Z INFO    decode-0 request=r-7f3a attempt=r-7f3a#0 reserved blocks=4
    {"ts":"2026-11-20T17:40:01.123Z","level":"info","origin":"decode-0","request":"r-7f3a",...}

A line is about an attempt when one of its arguments is an `AttemptId`, or its `extra` has `about(...)`. More
fields come as `extra={"fields": {...}}`. What looks like a credential is blotted out, wherever it is.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.operation_settings import LogFormat, LoggingSettings

OURS: Final = ("pdserve", "coordinator", "prefill", "decode", "kvtransfer", "pdkernels", "pdcpu")
"""Packages whose lines go to log files from the configured level on; others' do from warnings on."""
REQUESTS: Final = "pdserve.request"
"""The logger of lines about requests."""
_SECRET: Final = re.compile(
    r"(?i)(bearer\s+|(?:api[-_]?key|authorization|password|secret|auth[-_]token)[\"']?\s*[:=]\s*[\"']?)"
    r"(?!bearer\b)[^\s\"',;}]+"
)
_LEVEL_WIDTH: Final = 7
_IN_PASSING: Final = re.compile(r'\S+Z (INFO|DEBUG) |\{"ts":"[^"]*","level":"(info|debug)"')
_SILENT: Final = logging.CRITICAL + 1

Fields = dict[str, object]


def about(request: RequestId | None = None, attempt: AttemptId | None = None, **fields: object) -> Fields:
    """The `extra` of a line about a request."""
    ids: Fields = {}
    if attempt is not None:
        ids |= {"request": str(attempt.request), "attempt": str(attempt)}
    elif request is not None:
        ids["request"] = str(request)
    return {"fields": ids | fields}


class _Formatter(logging.Formatter):
    def __init__(self, origin: str) -> None:
        super().__init__()
        self._origin = origin

    def fields(self, record: logging.LogRecord) -> Fields:
        """Ids first."""
        found: Fields = {}
        args = record.args if isinstance(record.args, tuple) else ()
        for arg in args:
            if isinstance(arg, AttemptId):
                found = {"request": str(arg.request), "attempt": str(arg)}
                break
        more = getattr(record, "fields", None)
        return {**found, **more} if isinstance(more, Mapping) else found

    def trace(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""

    def moment(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        return f"{at:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z"


class HumanFormatter(_Formatter):
    """Time, level, who, ids, what, and the other fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in self.fields(record).items() if value is not None}
        ids = "".join(f" {key}={fields.pop(key)}" for key in ("request", "attempt") if key in fields)
        rest = "".join(f" {key}={value}" for key, value in fields.items())
        text = f"{record.getMessage()}{rest}"
        if record.exc_info:
            text += "\n" + self.trace(record)
        return redacted(
            f"{self.moment(record)} {record.levelname:<{_LEVEL_WIDTH}} {self._origin}{ids} {text}"
        )


class JsonFormatter(_Formatter):
    """One object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: Fields = {
            "ts": self.moment(record),
            "level": record.levelname.lower(),
            "origin": self._origin,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in self.fields(record).items() if value is not None}
        if record.exc_info:
            line["exception"] = self.trace(record)
        return redacted(json.dumps(line, separators=(",", ":"), default=str))


def redacted(text: str) -> str:
    """Without what looks like a credential: for lines of libraries too, which we did not write."""
    return _SECRET.sub(r"\1***", text)


def is_said_in_passing(line: str) -> bool:
    """Whether a line, in either shape, is of ours and below a warning."""
    return _IN_PASSING.match(line) is not None


class _OursOrLoud(logging.Filter):
    def __init__(self, settings: LoggingSettings) -> None:
        super().__init__()
        self._level, self._requests = level_of(settings), settings.requests

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name.partition(".")[0] in OURS
        if record.name == REQUESTS and not self._requests:
            ours = False
        return record.levelno >= (self._level if ours else logging.WARNING)


def handler_of(
    settings: LoggingSettings, *, origin: str, stream: TextIO | None = None, file: Path | None = None
) -> logging.Handler:
    """Writes lines of `origin` (a worker's name, or `coordinator`) to a file or a stream."""
    handler = logging.StreamHandler(stream or sys.stderr) if file is None else logging.FileHandler(file)
    make = JsonFormatter if settings.format is LogFormat.JSON else HumanFormatter
    handler.setFormatter(make(origin))
    handler.addFilter(_OursOrLoud(settings))
    return handler


def level_of(settings: LoggingSettings) -> int:
    return logging.getLevelNamesMapping()[settings.level.upper()]


def log_worker(settings: LoggingSettings, origin: str) -> None:
    """Lines of this process go to standard error, which Ray keeps in a file per worker.

    Written at once: what a process says before it dies must be there. A process that logs already (a test's)
    is left alone.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(handler_of(settings, origin=origin))
        root.setLevel(level_of(settings))


class BackgroundLog:
    """Lines of this process to `handlers`, on a thread of its own: the event loop formats and writes nothing.

    Handlers that were there, the terminal's, keep to the level that they showed before.
    """

    def __init__(
        self,
        settings: LoggingSettings,
        handlers: Sequence[logging.Handler],
        *,
        muted: Sequence[logging.Handler] = (),
    ) -> None:
        """muted: handlers that were there and shall say nothing meanwhile."""
        root = logging.getLogger()
        self._before = root.level
        self._shown = {handler: handler.level for handler in root.handlers}
        for handler, level in self._shown.items():
            handler.setLevel(_SILENT if handler in muted else max(level, root.level))
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._handlers = tuple(handlers)
        self._inlet = _Inlet(lines)
        self._listener = logging.handlers.QueueListener(lines, *handlers)
        self._listener.start()
        root.addHandler(self._inlet)
        root.setLevel(min(level_of(settings), root.level or logging.WARNING))

    def close(self) -> None:
        """Write what is left, and leave logging as it was."""
        root = logging.getLogger()
        root.removeHandler(self._inlet)
        root.setLevel(self._before)
        for handler, level in self._shown.items():
            handler.setLevel(level)
        self._listener.stop()
        for handler in self._handlers:
            handler.close()


class _Inlet(logging.handlers.QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """As it is: it stays in this process, and its arguments are immutable or ids."""
        return record
