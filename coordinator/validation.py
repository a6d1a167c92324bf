"""From a request on the wire to samples the registry can run. A complaint names field, value and limit."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from coordinator.contract import Classes, Contract, resolve
from coordinator.events import NewRequest
from coordinator.models import LoadedModel
from pdserve.core.errors import InvalidRequest, ModelNotFound, PromptTooLong
from pdserve.core.ids import RequestId, child_request_id, new_request_id
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import SamplingLimits, SamplingParams
from pdserve.text.chat import ChatMessage

MAX_ID_CHARS: Final = 128
_SCALARS: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "n",
)
_MODEL_DEFAULTS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_ID_CHARS: Final = frozenset(map(chr, range(0x21, 0x7F)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A request whose every field but the prompt's length has been looked at."""

    id: RequestId
    client_chose_id: bool
    model: LoadedModel
    sampling: SamplingParams
    contract: Contract
    tenant: str


def find_model(name: str, models: Mapping[str, LoadedModel]) -> LoadedModel:
    """By any of its names. Raises `ModelNotFound`; an empty name is the only model there is."""
    if not name and len({model.served.name for model in models.values()}) == 1:
        return next(iter(models.values()))
    if name not in models:
        raise ModelNotFound(name, list(models))
    return models[name]


def check(
    request: pb.GenerateRequest,
    models: Mapping[str, LoadedModel],
    *,
    limits: SamplingLimits,
    default_max_tokens: int,
    classes: Classes = MappingProxyType({}),
    default_class: str | None = None,
) -> Checked:
    """Raises `InvalidRequest` or `ModelNotFound`. Costs little, whatever the request holds."""
    model = find_model(request.model, models)
    if request.request_id:
        _require_text("request_id", request.request_id, _ID_CHARS)
    if len(request.tenant) > MAX_ID_CHARS or not request.tenant.isprintable():
        raise InvalidRequest(
            field="tenant", value=request.tenant, limit=f"at most {MAX_ID_CHARS} printable characters"
        )
    _require_short_lists(request.sampling, limits)
    sampling = sampling_params(request.sampling, model, default_max_tokens)
    sampling.validate(vocab_size=model.served.vocab_size, limits=limits)
    return Checked(
        id=RequestId(request.request_id) if request.request_id else new_request_id(),
        client_chose_id=bool(request.request_id),
        model=model,
        sampling=sampling,
        contract=resolve(request, classes, model.served.classes, model.served.default_class or default_class),
        tenant=request.tenant,
    )


def sampling_params(wire: pb.Sampling, model: LoadedModel, default_max_tokens: int) -> SamplingParams:
    """What the request sets, else what the model recommends, else our defaults; with a seed, unchecked."""
    given = {name: getattr(wire, name) for name in _SCALARS if wire.HasField(name)}
    for name in _MODEL_DEFAULTS:
        recommended = getattr(model.defaults, name)
        if name not in given and recommended is not None:
            given[name] = recommended
    given.setdefault("max_tokens", max(default_max_tokens, given.get("min_tokens", 0)))
    given.setdefault("seed", secrets.randbits(63))
    return SamplingParams(
        **given,
        logit_bias=dict(wire.logit_bias),
        stop=tuple(wire.stop),
        stop_token_ids=tuple(wire.stop_token_ids),
    )


def tokenise(request: pb.GenerateRequest, model: LoadedModel) -> list[int]:
    """The prompt's token ids. May take long for a long text: not for the event loop then."""
    kind = request.WhichOneof("prompt")
    limit = "set: one of text, token_ids and chat"
    match kind:
        case None:
            raise InvalidRequest(field="prompt", value=None, limit=limit)
        case "token_ids":
            ids, limit_len = request.token_ids.ids, model.served.max_model_len
            if len(ids) >= limit_len:  # before they are copied and looked at
                raise PromptTooLong(prompt_tokens=len(ids), max_model_len=limit_len)
            tokens = list(ids)
            _require_in_vocabulary(tokens, model.served.vocab_size)
        case "text":
            if not request.text:
                raise InvalidRequest(field="prompt", value="", limit="at least one character")
            tokens = model.tokenizer.encode(request.text)
        case "chat":
            tokens = model.tokenizer.encode(_render(request.chat, model), add_special_tokens=False)
    if not tokens:
        raise InvalidRequest(field="prompt", value="0 tokens", limit="at least one token")
    return tokens


def prompt_chars(request: pb.GenerateRequest) -> int:
    """How much text there is to tokenise."""
    if request.WhichOneof("prompt") == "chat":
        return sum(len(message.content) for message in request.chat.messages)
    return len(request.text)


def samples(
    checked: Checked,
    tokens: list[int],
    *,
    max_model_len: int,
    arrival: float,
    arrived: float,
    deadline: float,
    first_epoch: int,
) -> tuple[NewRequest, ...]:
    """The n samples of a request, max_tokens cut to what the context has room for. Raises `PromptTooLong`."""
    room = max_model_len - len(tokens)
    if room < 1:
        raise PromptTooLong(prompt_tokens=len(tokens), max_model_len=max_model_len)
    asked = checked.sampling
    sampling = replace(
        asked, n=1, max_tokens=min(asked.max_tokens, room), min_tokens=min(asked.min_tokens, room)
    )
    contract = checked.contract
    salt = cache_salt(checked.model.served.name, checked.tenant)
    base = NewRequest(
        id=checked.id,
        model=checked.model.served.name,
        tokens=tokens,
        sampling=sampling,
        eos_token_ids=checked.model.eos_token_ids,
        cache_salt=salt,
        arrival=arrival,
        arrived=arrived,
        deadline=deadline,
        ttft_target_s=contract.ttft_target_s,
        tpot_target_s=contract.tpot_target_s,
        priority=contract.priority,
        preemptible=contract.preemptible,
        queue_ttl_s=contract.queue_ttl_s,
        sla_class=contract.sla_class,
        tenant=checked.tenant,
        first_epoch=first_epoch,
    )
    if asked.n == 1:
        return (base,)
    return tuple(
        replace(base, id=child_request_id(checked.id, index), sampling=_sampling_of(sampling, index))
        for index in range(asked.n)
    )


def _sampling_of(sampling: SamplingParams, index: int) -> SamplingParams:
    """Of sample `index`. Prompt logprobs are the same for all: the first brings them."""
    asked = sampling.prompt_logprobs if index == 0 else None
    return replace(sampling, seed=sample_seed(sampling.seed or 0, index), prompt_logprobs=asked)


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index`: the request's own for sample 0, which so equals the answer with n = 1; for the
    others the first 63 bits of BLAKE2b over seed and index, each as 8 bytes, big-endian."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "big") + index.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cache_salt(model: str, tenant: str) -> bytes:
    """Root of a prefix-hash chain: tenants do not see each other's cache hits."""
    parts = (model.encode(), tenant.encode())
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.blake2b(framed, digest_size=16).digest()


def _render(chat: pb.Chat, model: LoadedModel) -> str:
    if not chat.messages:
        raise InvalidRequest(field="messages", value=[], limit="at least one message")
    if not model.tokenizer.has_chat_template:
        name = model.served.name
        raise InvalidRequest(field="messages", value="a chat", limit=f"text: {name} has no chat template")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequest(field=f"messages[{index}].role", value="", limit="a role, such as 'user'")
    turns = [ChatMessage(role=message.role, content=message.content) for message in chat.messages]
    opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    return model.tokenizer.apply_chat_template(turns, add_generation_prompt=opened)


def _require_short_lists(wire: pb.Sampling, limits: SamplingLimits) -> None:
    """Before they are copied: a message may hold a million entries."""
    for field, count, limit in (
        ("stop", len(wire.stop), limits.max_stop_strings),
        ("stop_token_ids", len(wire.stop_token_ids), limits.max_stop_token_ids),
        ("logit_bias", len(wire.logit_bias), limits.max_logit_bias),
    ):
        if count > limit:
            raise InvalidRequest(field=field, value=f"{count} entries", limit=f"at most {limit} entries")


def _require_in_vocabulary(tokens: list[int], vocab_size: int) -> None:
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        index, wrong = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab_size)
        raise InvalidRequest(
            field=f"prompt_token_ids[{index}]", value=wrong, limit=f"a token id in [0, {vocab_size})"
        )


def _require_text(field: str, value: str, allowed: frozenset[str]) -> None:
    if len(value) > MAX_ID_CHARS or not allowed.issuperset(value):
        limit = f"at most {MAX_ID_CHARS} printable ASCII characters without spaces"
        raise InvalidRequest(field=field, value=value, limit=limit)
