"""What goes over the wire comes back the same, and anything else is a typed error."""

from __future__ import annotations

import dataclasses
import typing

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core import messages
from pdserve.core.codec import decode, decode_frame, encode, encode_frame
from pdserve.core.errors import ProtocolError
from pdserve.core.ids import AttemptId, RequestId
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.messages import FinishReason, Message, Tokens
from pdserve.core.sampling import SamplingParams, TokenLogprobs

MESSAGE_CLASSES = tuple(typing.get_args(messages.Message))
_finite = st.floats(allow_nan=False, allow_infinity=False)


def _strategy_of(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{f.name: _strategy_of(hints[f.name]) for f in dataclasses.fields(hint)})
    if hint is float:
        return _finite
    if hint is int or getattr(hint, "__supertype__", None) is int:
        return st.integers(min_value=-(2**63), max_value=2**63 - 1)
    args = typing.get_args(hint)
    match typing.get_origin(hint):
        case origin if origin is list:
            return st.lists(_strategy_of(args[0]), max_size=4)
        case origin if origin is tuple and Ellipsis in args:
            return st.lists(_strategy_of(args[0]), max_size=4).map(tuple)
        case origin if origin is tuple:
            return st.tuples(*[_strategy_of(arg) for arg in args])
        case origin if origin is dict:
            return st.dictionaries(_strategy_of(args[0]), _strategy_of(args[1]), max_size=4)
        case None:
            return st.from_type(hint)
        case _:
            return st.one_of([st.none() if arg is type(None) else _strategy_of(arg) for arg in args])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_batch_of_messages_survives_the_wire(data: st.DataObject) -> None:
    classes = data.draw(st.lists(st.sampled_from(MESSAGE_CLASSES), max_size=4))
    batch: list[Message] = [data.draw(_strategy_of(cls)) for cls in classes]
    assert decode_frame(encode_frame(batch)) == batch


def _tokens() -> Tokens:
    return Tokens(
        attempt=AttemptId(RequestId("r1"), 2),
        first_index=7,
        tokens=[5, 6],
        logprobs=[TokenLogprobs(5, -0.5, ((5, -0.5), (9, -1.25)))] * 2,
        finish_reason=FinishReason.STOP,
    )


def test_decoded_enums_and_tuples_have_their_types_back() -> None:
    back = decode(encode(_tokens()))
    assert isinstance(back, Tokens)
    assert back.finish_reason is FinishReason.STOP
    assert isinstance(back.logprobs[0].top, tuple)
    assert isinstance(back.logprobs[0].top[0], tuple)


def test_another_protocol_version_is_refused_by_name() -> None:
    frame = msgpack.packb([PROTOCOL_VERSION + 1, [0, 1, "x"]])
    with pytest.raises(ProtocolError, match=f"protocol {PROTOCOL_VERSION + 1}"):
        decode_frame(frame)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        msgpack.packb(None),
        msgpack.packb(7),
        msgpack.packb({"a": 1}),
        msgpack.packb([PROTOCOL_VERSION, [999, 1]]),
        msgpack.packb([PROTOCOL_VERSION, [-1, 1]]),
        msgpack.packb([PROTOCOL_VERSION, "text"]),
        msgpack.packb([PROTOCOL_VERSION, [0, "not an int", "x"]]),
        msgpack.packb([PROTOCOL_VERSION, [0, 1]]),
        msgpack.packb([PROTOCOL_VERSION, [16, ["r", 0], 0, [1, "2"], [], None]]),
        msgpack.packb([PROTOCOL_VERSION, [16, ["r", 0], 0, [1], [], "no such reason"]]),
    ],
)
def test_a_broken_frame_is_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(frame)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_raise_anything_but_a_protocol_error(noise: bytes) -> None:
    try:
        decode_frame(noise)
    except ProtocolError:
        return
    # Only an empty frame of our version can be made by chance.
    assert noise == bytes([0x91, PROTOCOL_VERSION])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_gives_a_message_or_a_protocol_error(data: st.DataObject) -> None:
    frame = bytearray(encode_frame([_tokens()]))
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    try:
        decode_frame(bytes(frame))
    except ProtocolError:
        return


def test_two_messages_where_one_was_wanted_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="found 2"):
        decode(encode_frame([_tokens(), _tokens()]))


def test_sampling_params_keep_integer_keys() -> None:
    spec = messages.RequestSpec(
        attempt=AttemptId(RequestId("r"), 0),
        tokens=[1],
        num_prompt_tokens=1,
        sampling=SamplingParams(logit_bias={3: -1.5}),
        eos_token_ids=(2,),
        cache_salt=b"s",
        arrival=0.0,
    )
    start = messages.StartDecode(spec=spec, prefill_worker=None, lease_s=1.0)
    assert decode(encode(start)) == start
