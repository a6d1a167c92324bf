"""`pdserve generate`: ask a running service."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Final

import typer
from rich.markup import escape

from pdserve.cli.access import access
from pdserve.cli.console import ERR, write_answer
from pdserve.cli.summary import summary_line
from pdserve.client import Client, Delta, RequestOptions
from pdserve.core.errors import InvalidRequest, ProtocolError

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Needed only where several are served.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Ask through the model's chat template, or continue the text."),
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Shortest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", "-t", help="0: greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k best tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the best tokens of this total.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Least probability, relative to the best token's.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: avoid what was said.")] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Above 0: avoid tokens that occurred.")
    ] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Above 0: avoid frequent tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on to max_tokens.")] = False,
    sla_class: Annotated[
        str | None, typer.Option("--class", help="Service class, such as interactive or batch.")
    ] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Target for the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target per token after the first.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="The same target, as a speed.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose request it is: limits and fair shares.")] = None,
    priority: Annotated[int | None, typer.Option(help="Lower is more urgent.")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the deltas as JSON lines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer only.")] = False,
) -> None:
    """Send a prompt to a running service and stream the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if system is not None and not chat:
        raise InvalidRequest(field="--system", value=system, limit="used with --chat")
    options = RequestOptions(
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
            deltas = client.stream(messages=_messages(text, system), **options)
        else:
            deltas = client.stream(prompt=text, **options)
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
