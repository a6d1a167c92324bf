"""msgpack frames of messages: `[version, [tag, field, field, ...], ...]`.

A message is an array, its fields in the order of the dataclass; a peer of another version is refused by the
frame's first element. Nothing is pickled. Encoders and decoders are built once per class from its type hints.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache
from typing import Any, Final, cast

import msgpack

from pdserve.core import handover, messages, worker_state
from pdserve.core.errors import ProtocolError
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import Message

# Tags are part of the wire format: append, never reorder.
_TAGGED: Final[tuple[type, ...]] = (
    messages.Hello,
    messages.ConnectPeer,
    messages.DropPeer,
    messages.StartDecode,
    messages.StartPrefill,
    messages.RenewLease,
    messages.Cancel,
    messages.Drain,
    messages.WorkerInfo,
    messages.Reserved,
    messages.Refused,
    messages.PrefillStarted,
    messages.PrefillProgress,
    messages.PrefillDone,
    messages.TransferDone,
    messages.KvArrived,
    messages.Tokens,
    messages.AttemptFailed,
    messages.Heartbeat,
    handover.PushNote,
    messages.PushesSettled,
    messages.Migrate,
    messages.Orphaned,
    messages.Undrain,
    messages.ChangeRole,
    messages.Preempt,
    messages.Preempted,
    messages.RoleChanged,
    messages.ReceivePrefix,
    messages.PushPrefix,
    handover.PrefixNote,
    messages.SendPrefixes,
    worker_state.PrefixEvents,
)
_TAG_OF: Final[dict[type, int]] = {cls: tag for tag, cls in enumerate(_TAGGED)}

_Convert = Callable[[Any], Any]
_PLAIN: Final = (int, float, str, bytes, bool, type(None))


def encode_frame(batch: Sequence[Message]) -> bytes:
    """One frame of messages, without the length prefix that `channel` adds."""
    out: list[object] = [PROTOCOL_VERSION]
    for message in batch:
        cls: type = type(message)
        fields = cast("list[object]", _encoder(cls)(message))
        out.append([_TAG_OF[cls], *fields])
    return cast("bytes", msgpack.packb(out, use_bin_type=True))


def decode_frame(data: bytes) -> list[Message]:
    """Messages of a frame, or `ProtocolError` for anything that is not one."""
    try:
        frame = msgpack.unpackb(data, raw=False, strict_map_key=False)
        version, *packed = frame
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not a frame: {error}") from error
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"peer speaks protocol {version!r}, this process {PROTOCOL_VERSION}; upgrade one")
    try:
        return [_decoder(_TAGGED[tag])(fields) for tag, *fields in packed]
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise ProtocolError(f"malformed message: {type(error).__name__}: {error}") from error


def encode(message: Message) -> bytes:
    """One message as a frame of its own, as a transfer's notification carries it."""
    return encode_frame([message])


def decode(data: bytes) -> Message:
    batch = decode_frame(data)
    if len(batch) != 1:
        raise ProtocolError(f"wanted one message, found {len(batch)}")
    return batch[0]


def to_fields(value: object) -> object:
    """A dataclass of what messages may hold, as what msgpack takes; for files, which outlive no version."""
    cls: type = type(value)
    return _encoder(cls)(value)


def from_fields(cls: type, fields: object) -> object:
    """What `to_fields` made of a `cls`. Raises TypeError or ValueError for anything else."""
    return _decoder(cls)(fields)


def _identity(value: Any) -> Any:
    return value


def _unwrap(hint: Any) -> Any:
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    return hint


def _optional_of(hint: Any) -> Any | None:
    """`T` for `T | None`, else None. Other unions have no place on the wire."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(rest) == 1:
            return rest[0]
        raise TypeError(f"{hint} cannot be sent: only T | None is")
    return None


@cache
def _encoder(hint: Any) -> _Convert:
    hint = _unwrap(hint)
    inner = _optional_of(hint)
    if inner is not None:
        encode_inner = _encoder(inner)
        if encode_inner is _identity:
            return _identity
        return lambda value: None if value is None else encode_inner(value)
    if dataclasses.is_dataclass(hint):
        return _dataclass_encoder(cast("type", hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return lambda value: value.value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        encode_each = [_encoder(arg) for arg in args if arg is not Ellipsis]
        if all(each is _identity for each in encode_each):
            return _identity
        if origin is tuple and Ellipsis not in args:
            return lambda value: [enc(item) for enc, item in zip(encode_each, value, strict=True)]
        return lambda value: [encode_each[0](item) for item in value]
    if origin is dict or hint in _PLAIN:
        return _identity
    raise TypeError(f"{hint} cannot be sent")


def _dataclass_encoder(cls: type) -> _Convert:
    hints = typing.get_type_hints(cls)
    plan = [(f.name, _encoder(hints[f.name])) for f in dataclasses.fields(cls)]
    return lambda value: [enc(getattr(value, name)) for name, enc in plan]


@cache
def _decoder(hint: Any) -> _Convert:
    hint = _unwrap(hint)
    inner = _optional_of(hint)
    if inner is not None:
        decode_inner = _decoder(inner)
        return lambda value: None if value is None else decode_inner(value)
    if dataclasses.is_dataclass(hint):
        return _dataclass_decoder(cast("type", hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return cast("_Convert", hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        key, val = _decoder(args[0]), _decoder(args[1])
        return lambda value: {key(k): val(v) for k, v in value.items()}
    if origin is list:
        return _sequence_decoder(_unwrap(args[0]), list)
    if origin is tuple:
        if Ellipsis in args:
            return _sequence_decoder(_unwrap(args[0]), tuple)
        each = [_decoder(arg) for arg in args]
        return lambda value: tuple(dec(item) for dec, item in zip(each, value, strict=True))
    if hint in _PLAIN:
        return _checked(hint)
    raise TypeError(f"{hint} cannot be received")


def _sequence_decoder(item: Any, build: type) -> _Convert:
    if item is int:
        # The hot path: token ids and block ids. One C-level pass checks the type.
        def decode_ints(value: Any) -> Any:
            if not isinstance(value, list) or not all(type(item) is int for item in value):
                raise TypeError("wanted a list of integers")
            return build(value)

        return decode_ints
    decode_item = _decoder(item)
    return lambda value: build(decode_item(part) for part in value)


def _checked(kind: type) -> _Convert:
    if kind is float:

        def decode_float(value: Any) -> Any:
            if type(value) not in (float, int):
                raise TypeError(f"wanted a number, found {type(value).__name__}")
            return float(value)

        return decode_float

    def decode_plain(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"wanted {kind.__name__}, found {type(value).__name__}")
        return value

    return decode_plain


def _dataclass_decoder(cls: type) -> _Convert:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    decoders = [_decoder(hints[name]) for name in names]

    def decode_fields(values: Any) -> Any:
        parts = {n: dec(v) for n, dec, v in zip(names, decoders, values, strict=True)}
        return cls(**parts)

    return decode_fields
