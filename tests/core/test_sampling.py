"""Limits of every sampling field, each named in its error."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.core.sampling import SamplingLimits, SamplingParams


def _validate(**fields: Any) -> None:
    SamplingParams(**fields).validate(vocab_size=100, limits=SamplingLimits())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0, "max_tokens": 1},
        {"top_k": 100, "top_p": 1e-6, "min_p": 1.0},
        {"logit_bias": {0: -100.0, 99: 100.0}, "stop_token_ids": (0, 99), "stop": ("x",) * 16},
        {"min_tokens": 5, "max_tokens": 5, "seed": 2**63 - 1, "n": 16, "logprobs": 0, "prompt_logprobs": 20},
    ],
)
def test_values_at_the_limits_pass(fields: dict[str, Any]) -> None:
    _validate(**fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 101),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("n", 0),
        ("n", 17),
        ("stop", ("x",) * 17),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop_token_ids", tuple(range(100)) * 3),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {100: 0.0}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: math.nan}),
    ],
)
def test_a_value_outside_its_limits_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}(\[\d+\])?: got .* must be"):
        _validate(**{name: value})


def test_a_huge_value_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidRequest) as caught:
        _validate(stop=("x" * 50,) * 10_000)
    assert len(str(caught.value)) < 300
