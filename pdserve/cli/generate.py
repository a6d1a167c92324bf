"""`pdserve generate`: ask a running service."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Final

from rich.markup import escape

from pdserve.cli import generate_options as options
from pdserve.cli.access import access
from pdserve.cli.console import ERR, write_answer
from pdserve.cli.summary import summary_line
from pdserve.client import Client, Delta, RequestOptions
from pdserve.core.errors import InvalidRequest, ProtocolError

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"


def generate(
    prompt: options.Prompt,
    address: options.Address = DEFAULT_ADDRESS,
    model: options.ModelName = None,
    chat: options.Chat = True,
    system: options.SystemMessage = None,
    max_tokens: options.MaxTokens = None,
    min_tokens: options.MinTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    sla_class: options.ServiceClass = None,
    ttft_ms: options.TtftTarget = None,
    tpot_ms: options.TpotTarget = None,
    tokens_per_second: options.TokensPerSecond = None,
    tenant: options.Tenant = None,
    priority: options.Priority = None,
    deadline_s: options.Deadline = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Send a prompt to a running service and stream the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if system is not None and not chat:
        raise InvalidRequest(field="--system", value=system, limit="used with --chat")
    wanted = RequestOptions(
        model=model,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos or None,
        sla_class=sla_class,
        ttft_target_ms=ttft_ms,
        tpot_target_ms=tpot_ms,
        tokens_per_second=tokens_per_second,
        tenant=tenant,
        priority=priority,
        deadline_s=deadline_s,
    )
    with Client(address, access=access()) as client:
        if chat:
            deltas = client.stream(messages=_messages(text, system), **wanted)
        else:
            deltas = client.stream(prompt=text, **wanted)
        _show(deltas, as_json=as_json, quiet=quiet)


def _show(deltas: Iterator[Delta], *, as_json: bool, quiet: bool) -> None:
    last = _write_json(deltas) if as_json else _write_text(deltas)
    if last is None or last.timings is None or last.usage is None or last.finish_reason is None:
        raise ProtocolError("the stream ended without its last message")
    if not (quiet or as_json):
        ERR.print(f"[dim]{escape(summary_line(last.usage, last.timings, last.finish_reason))}[/]")


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": text}]


def _write_text(deltas: Iterator[Delta]) -> Delta | None:
    last: Delta | None = None
    with ERR.status("waiting for the first token") as waiting:
        for delta in deltas:
            waiting.stop()
            write_answer(delta.text)
            last = delta
    write_answer("\n")
    return last


def _write_json(deltas: Iterator[Delta]) -> Delta | None:
    last: Delta | None = None
    for delta in deltas:
        write_answer(json.dumps(dataclasses.asdict(delta), ensure_ascii=False) + "\n")
        last = delta
    return last
