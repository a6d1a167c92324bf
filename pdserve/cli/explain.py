"""`pdserve explain`: why a request went where it went, and what it came to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.markup import escape

from pdserve.cli.access import access
from pdserve.cli.console import ERR, OUT
from pdserve.cli.generate import DEFAULT_ADDRESS
from pdserve.cli.summary import milliseconds, size
from pdserve.cli.timeline import chrome_trace
from pdserve.client.admin import explain as ask
from pdserve.core.errors import ConfigError
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb


def explain(
    request: Annotated[str, typer.Argument(help="Its id; `last` for the one that arrived last.")] = "last",
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as one JSON object.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a timeline that ui.perfetto.dev opens.", metavar="FILE", dir_okay=False),
    ] = None,
) -> None:
    """Why a request was placed as it was, what was predicted here and elsewhere, and how its time went.

    The coordinator remembers the last requests, as many as coordinator.explain_last says.
    """
    story = ask(address, "" if request == "last" else request, access=access())
    if trace is not None:
        try:
            trace.write_text(chrome_trace(story))
        except OSError as error:
            raise ConfigError(f"--trace {trace}: {error.strerror}") from error
        ERR.print(f"wrote {escape(str(trace))}; open it at https://ui.perfetto.dev")
    if as_json:
        text = MessageToJson(
            story, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        typer.echo(text)
    elif trace is None:
        show(story)


def show(story: pb.Explanation) -> None:
    """In words and tables, on standard output."""
    _head(story)
    told: list[pb.ExplainNote | pb.ExplainDecision] = [*story.notes, *story.decisions]
    for item in sorted(told, key=lambda item: item.at_s):
        if isinstance(item, pb.ExplainDecision):
            _decision(item)
        else:
            OUT.print(f"{_at(item.at_s)}  {escape(item.text)}")
    _attempts(story)
    _outcome(story)


def _head(story: pb.Explanation) -> None:
    came = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(story.arrival))
    OUT.print(f"[bold]{escape(story.request)}[/]  {escape(story.model)}, {came}")
    facts = [f"{story.prompt_tokens} tokens in, at most {story.max_tokens} out", f"priority {story.priority}"]
    if story.sla_class:
        facts.append(f"class {story.sla_class}")
    if story.tenant:
        facts.append(f"tenant {story.tenant}")
    if story.HasField("ttft_target_s"):
        facts.append(f"TTFT target {milliseconds(story.ttft_target_s)}")
    if story.HasField("tpot_target_s"):
        facts.append(f"TPOT target {milliseconds(story.tpot_target_s)}")
    OUT.print(f"  {escape(', '.join(facts))}")


def _decision(decision: pb.ExplainDecision) -> None:
    what = f"attempt {decision.attempt}, policy {decision.policy}, {decision.tokens} tokens"
    OUT.print(f"{_at(decision.at_s)}  [bold]{escape(what)}[/]{escape(decision.why and ': ' + decision.why)}")
    for role, choice in (("decode", decision.decode), ("prefill", decision.prefill)):
        if choice.worker:
            OUT.print(f"  {role}: [bold]{escape(choice.worker)}[/], {escape(choice.reason)}")
            _candidates(choice)
    for index, route in enumerate(decision.routes):
        how = (
            f"{route.prefill} reads, {route.decode} writes" if route.prefill else f"{route.decode} does both"
        )
        OUT.print(
            f"  {'taken:   ' if index == 0 else 'instead: '}{escape(how)}: TTFT {milliseconds(route.ttft_s)} "
            f"± {milliseconds(route.ttft_std_s)}, TPOT {milliseconds(route.tpot_s)}, KV exposed "
            f"{milliseconds(route.exposed_s)}, others wait {milliseconds(route.others_s)}, "
            f"cost {route.cost:.4g}"
        )
    for rejected in decision.rejected:
        OUT.print(f"  not {escape(rejected.worker)}: {escape(rejected.why)}")


def _candidates(choice: pb.ExplainChoice) -> None:
    """A table as wide as it is: a terminal may wrap it, but nothing is cut off."""
    rows = [
        ("worker", "score", "misses", "load", "prefix", "TTFT", "TPOT"),
        *(
            (
                candidate.worker,
                f"{candidate.score:.4g}",
                f"{candidate.violation:.0%}" if candidate.violation else "-",
                f"{candidate.load:.3g}",
                str(candidate.prefix_tokens or "-"),
                milliseconds(candidate.ttft_s) if candidate.HasField("ttft_s") else "-",
                milliseconds(candidate.tpot_s) if candidate.HasField("tpot_s") else "-",
            )
            for candidate in choice.candidates
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, (worker, *values) in enumerate(rows):
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        line = escape("    " + "  ".join([worker.ljust(widths[0]), *cells]))
        OUT.print(f"[dim]{line}[/]" if index == 0 else line)
    if choice.candidates_left_out:
        OUT.print(f"    and {choice.candidates_left_out} with higher scores")


def _attempts(story: pb.Explanation) -> None:
    for attempt in story.attempts:
        reader = attempt.prefill_worker or attempt.decode_worker
        parts = [f"read by {reader}, written by {attempt.decode_worker}"]
        if attempt.HasField("prefill_start_s") and attempt.HasField("prefill_end_s"):
            took = attempt.prefill_end_s - attempt.prefill_start_s
            parts.append(f"prompt {milliseconds(took)} in {len(attempt.chunks)} chunks")
        if attempt.prefill_queue_s:
            parts.append(f"queue there {milliseconds(attempt.prefill_queue_s)}")
        if attempt.bytes_moved:
            parts.append(
                f"KV {size(attempt.bytes_moved)} over {attempt.transfer_path}, "
                f"{milliseconds(attempt.transfer_exposed_s)} exposed"
            )
        if attempt.cached_tokens:
            parts.append(f"{attempt.cached_tokens} tokens cached")
        if attempt.failure:
            parts.append(f"failed: {attempt.failure}")
        parts.append(f"{milliseconds(attempt.end_s - attempt.start_s)} in all")
        OUT.print(f"{_at(attempt.start_s)}  attempt {attempt.attempt} {escape(', '.join(parts))}")


def _outcome(story: pb.Explanation) -> None:
    if not story.outcome:
        phase = story.phases[-1].phase if story.phases else "unknown"
        OUT.print(f"[bold]running[/]: {escape(phase)}, {story.output_tokens} tokens so far")
        return
    OUT.print(f"[bold]{escape(story.outcome)}[/]{escape(story.error and ': ' + story.error)}")
    timings = story.timings
    for what, came, wanted, late, blamed, predicted in (
        (
            "TTFT",
            timings.ttft_s,
            timings.HasField("ttft_target_s"),
            timings.ttft_late_s,
            timings.ttft_missed_in,
            timings.ttft_predicted_s if timings.HasField("ttft_predicted_s") else None,
        ),
        (
            "TPOT",
            timings.tpot_s,
            timings.HasField("tpot_target_s"),
            timings.tpot_late_s,
            timings.tpot_missed_in,
            timings.tpot_predicted_s if timings.HasField("tpot_predicted_s") else None,
        ),
    ):
        if not came:
            continue
        line = f"  {what} {milliseconds(came)}"
        if predicted is not None:
            line += f", predicted {milliseconds(predicted)}"
        if wanted:
            line += f"; target {'missed' if late > 0 else 'met'} by {milliseconds(abs(late))}"
            line += f", most of it in {blamed.replace('_', ' ')}" if blamed else ""
        OUT.print(line)
    OUT.print(
        f"  {story.output_tokens} tokens out, {milliseconds(timings.e2e_s)} in all, "
        f"{milliseconds(timings.queue_s)} of it waiting"
    )


def _at(seconds: float) -> str:
    return f"{f'+{seconds * 1e3:.1f} ms':>14}"
