"""Options of `pdserve generate`: a request, as a person writes it."""

from __future__ import annotations

from typing import Annotated

import typer

Prompt = Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")]
Address = Annotated[str, typer.Option("--address", "-a", help="host:port of the service.")]
ModelName = Annotated[str | None, typer.Option("--model", "-m", help="Needed only where several are served.")]
Chat = Annotated[
    bool,
    typer.Option("--chat/--raw", help="Ask through the model's chat template, or continue the text."),
]
SystemMessage = Annotated[str | None, typer.Option(help="System message, with --chat.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
MinTokens = Annotated[int | None, typer.Option(help="Shortest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", help="0: greedy.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k best tokens; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the best tokens of this total.")]
MinP = Annotated[float | None, typer.Option(help="Least probability, relative to the best token's.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: avoid what was said.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Above 0: avoid tokens that occurred.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Above 0: avoid frequent tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
IgnoreEos = Annotated[bool, typer.Option(help="Go on to max_tokens.")]
ServiceClass = Annotated[
    str | None, typer.Option("--class", help="Service class, such as interactive or batch.")
]
TtftTarget = Annotated[float | None, typer.Option(help="Target for the first token.")]
TpotTarget = Annotated[float | None, typer.Option(help="Target per token after the first.")]
TokensPerSecond = Annotated[float | None, typer.Option(help="The same target, as a speed.")]
Tenant = Annotated[str | None, typer.Option(help="Whose request it is: limits and fair shares.")]
Priority = Annotated[int | None, typer.Option(help="Lower is more urgent.")]
Deadline = Annotated[float | None, typer.Option(help="Give up after this many seconds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the deltas as JSON lines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer only.")]
