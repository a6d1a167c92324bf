"""A coordinator's inputs in a file, with their times: the same inputs to a fresh registry must give the same
decisions.

The file is a row of msgpack values: a header, then `[time, kind, fields, what was sent]` for every event.
What was sent is one line for each message to a worker; text that streams to clients is not recorded, but the
prompts' tokens are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

import msgpack

from coordinator.book import RegistrySettings
from coordinator.events import Action, Broken, Event, FromWorker, Send, Tick
from coordinator.registry import Registry
from coordinator.router import Router
from pdserve.core.codec import decode, encode, from_fields, to_fields
from pdserve.core.errors import ConfigError, PdServeError
from pdserve.core.ids import RequestId, WorkerId
from pdserve.core.messages import Message, StartDecode, Up

FORMAT: Final = 1
_KINDS: Final[dict[str, type]] = {cls.__name__: cls for cls in get_args(Event)}
_BUFFER_BYTES: Final = 1 << 20


class RecordingRegistry(Registry):
    """A registry that writes down what it is told, and what it sent to workers because of it."""

    def __init__(self, settings: RegistrySettings, router: Router, path: Path, config: str) -> None:
        """config: whatever `Recording.config` shall give back. Raises `ConfigError` when `path` cannot be
        written."""
        super().__init__(settings, router)
        try:
            self._file = path.open("wb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise ConfigError(f"coordinator.record: cannot write {path}: {error.strerror}") from error
        self._file.write(cast("bytes", msgpack.packb([FORMAT, config])))

    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        entry = [now, type(event).__name__, _fields_of(event), sent(actions)]
        self._file.write(cast("bytes", msgpack.packb(entry)))
        if isinstance(event, Tick):
            self._file.flush()  # a few times a second: what was recorded outlives the process
        return actions

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Recorded:
    at: float
    event: Event
    sent: list[str]


class Recording:
    """What a `RecordingRegistry` has written; where it was cut off, the last whole event is the end."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` for what is no recording of this version."""
        try:
            self._data = path.read_bytes()
            header = next(iter(msgpack.Unpacker(io.BytesIO(self._data), max_buffer_size=0)))
            number, self.config = header
        except (OSError, ValueError, TypeError, StopIteration, msgpack.UnpackException) as error:
            raise ConfigError(f"{path} is no recording: {error or 'it is empty'}") from error
        if number != FORMAT or not isinstance(self.config, str):
            raise ConfigError(f"{path} is a recording of format {number!r}, not {FORMAT}")

    def __iter__(self) -> Iterator[Recorded]:
        entries = iter(msgpack.Unpacker(io.BytesIO(self._data), max_buffer_size=0, strict_map_key=False))
        next(entries)
        for at, kind, fields, lines in entries:
            yield Recorded(at, _event_of(kind, fields), lines)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event after which something else was sent than had been."""

    index: int
    at: float
    event: Event
    recorded: list[str]
    replayed: list[str]


@dataclass(frozen=True, slots=True)
class Replayed:
    num_events: int
    num_placements: int
    difference: Difference | None


def replay(recording: Recording, registry: Registry) -> Replayed:
    """Give a fresh registry what was recorded, until it decides otherwise or the recording ends."""
    count, placements = 0, 0
    for recorded in recording:
        lines = sent(registry.handle(recorded.event, recorded.at))
        if lines != recorded.sent:
            other = Difference(count, recorded.at, recorded.event, recorded.sent, lines)
            return Replayed(count, placements, other)
        count += 1
        placements += sum(line.startswith(StartDecode.__name__) for line in lines)
    return Replayed(count, placements, None)


def sent(actions: list[Action]) -> list[str]:
    """What was decided: kind, worker, attempt, and who reads the prompt."""
    return [_line(action) for action in actions if isinstance(action, Send)]


def _line(send: Send) -> str:
    message = send.message
    if isinstance(message, StartDecode):
        reader = message.prefill_worker or "itself"
        return f"StartDecode {send.worker} {message.spec.attempt}, read by {reader}"
    about = getattr(message, "attempt", None) or getattr(getattr(message, "spec", None), "attempt", "")
    return f"{type(message).__name__} {send.worker} {about}".rstrip()


def _fields_of(event: Event) -> Any:
    match event:
        case FromWorker(worker=worker, epoch=epoch, message=message):
            return [worker, epoch, encode(cast("Message", message))]
        case Broken(request=request, error=error):
            return [request, str(error)]
        case _:
            return to_fields(event)


def _event_of(kind: str, fields: Any) -> Event:
    if kind == FromWorker.__name__:
        worker, epoch, data = fields
        return FromWorker(worker=WorkerId(worker), epoch=epoch, message=cast("Up", decode(data)))
    if kind == Broken.__name__:
        return Broken(request=RequestId(fields[0]), error=PdServeError(fields[1]))
    return cast("Event", from_fields(_KINDS[kind], fields))
