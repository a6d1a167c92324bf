"""What a request is asked with, and how it goes on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypedDict

from pdserve.core.errors import InvalidRequest
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb

Messages = Sequence[Mapping[str, str]]
"""Chat turns, each with `role` and `content`."""


class RequestOptions(TypedDict, total=False):
    """Everything but the prompt. What is left out or None takes the model's, then the server's default."""

    model: str | None
    request_id: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    max_tokens: int | None
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    n: int | None
    add_generation_prompt: bool | None
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    tokens_per_second: float | None
    sla_class: str | None
    deadline_s: float | None
    priority: int | None
    tenant: str | None


_SAMPLING: Final = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
    | {"seed", "max_tokens", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "n"}
)
_REQUEST: Final = frozenset(
    {"model", "request_id", "ttft_target_ms", "tpot_target_ms", "tokens_per_second", "sla_class"}
    | {"priority", "tenant"}
)


def build_request(
    prompt: str | None,
    prompt_token_ids: Sequence[int] | None,
    messages: Messages | None,
    options: RequestOptions,
) -> pb.GenerateRequest:
    """Raises `InvalidRequest` for what cannot be put on the wire; the server judges the rest."""
    request = pb.GenerateRequest()
    _set_prompt(request, prompt, prompt_token_ids, messages)
    for name, value in options.items():
        if value is None:
            continue
        try:
            _set_option(request, name, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(
                field=name, value=value, limit=f"what the field can hold: {error}"
            ) from error
    return request


def _set_option(request: pb.GenerateRequest, name: str, value: object) -> None:
    if name in _REQUEST:
        setattr(request, name, value)
    elif name in _SAMPLING:
        setattr(request.sampling, name, value)
    elif name == "deadline_s":
        request.deadline_ms = float(str(value)) * 1e3
    elif name == "stop":
        texts = [value] if isinstance(value, str) else value
        request.sampling.stop.extend(texts)  # type: ignore[arg-type]  # checked by protobuf
    elif name == "stop_token_ids":
        request.sampling.stop_token_ids.extend(value)  # type: ignore[arg-type]  # checked by protobuf
    elif name == "logit_bias" and isinstance(value, Mapping):
        for token, bias in value.items():
            request.sampling.logit_bias[token] = bias
    elif name == "add_generation_prompt":
        if request.HasField("chat"):
            request.chat.add_generation_prompt = bool(value)
    else:
        raise TypeError("there is no such option")


def _set_prompt(
    request: pb.GenerateRequest,
    prompt: str | None,
    prompt_token_ids: Sequence[int] | None,
    messages: Messages | None,
) -> None:
    given = {"prompt": prompt, "prompt_token_ids": prompt_token_ids, "messages": messages}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        limit = "exactly one of prompt, prompt_token_ids and messages"
        raise InvalidRequest(field="prompt", value=" and ".join(names) or None, limit=limit)
    try:
        if prompt is not None:
            request.text = prompt
        elif prompt_token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(prompt_token_ids)
        elif messages is not None:
            request.chat.SetInParent()
            for turn in messages:
                request.chat.messages.add(role=turn["role"], content=turn["content"])
    except (TypeError, ValueError, KeyError) as error:
        limit = "text, token ids, or messages of role and content"
        raise InvalidRequest(field=names[0], value=given[names[0]], limit=f"{limit} ({error})") from error
