"""`pdserve demo`: the whole system once, from nothing to an answer to nothing."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from pdserve.cli.console import ERR, OUT, Reporter, write_answer
from pdserve.cli.options import ConfigFile, Decode, ModelName, Prefill, Settings, build_config
from pdserve.cli.summary import summary_line
from pdserve.client import AsyncClient, Delta
from pdserve.core.config import ServeConfig
from pdserve.core.errors import ProtocolError

# One lone short question is answered soonest where no KV moves, and a demonstration is to show it moving.
_KV_MOVES = ("coordinator.local_prefill=never", "coordinator.whole_on_prefill=never")

DEFAULT_PROMPT = "What is the capital of France, and what is it known for?"


def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = DEFAULT_PROMPT,
    model: ModelName = None,
    prefill: Prefill = None,
    decode: Decode = None,
    config: ConfigFile = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 96,
    settings: Settings = None,
) -> None:
    """Ask one question of a deployment made for it: a prefill worker and a decode worker on this machine.

    Fetches the default model on first use. Starts Ray, both workers and the gRPC server, streams the answer,
    prints one line of figures, and stops everything again. One worker reads the prompt, the other writes
    the answer, which a service does where it pays (--set coordinator.local_prefill=auto).
    """
    resolved = build_config(
        config,
        [*_KV_MOVES, *(settings or [])],
        {
            "model": {"model": model},
            "prefill": {"workers": prefill},
            "decode": {"workers": decode},
            # Beside a deployment that runs already, and without a dashboard that nobody would see.
            "coordinator": {"port": 0},
            "cluster": {"dashboard": False, "linger_s": 0.0},
        },
    )
    _run(resolved, prompt, max_tokens)


def _run(config: ServeConfig, prompt: str, max_tokens: int) -> None:
    # Here, not at the top: Ray takes a second to import, which `--help` should not.
    from pdserve import launch

    async def main() -> None:
        with Reporter() as report:
            async with launch.deployed(config, report) as deployment:
                report.close()
                where = (
                    f"{len(deployment.plan.prefill)} prefill + {len(deployment.plan.decode)} decode workers"
                )
                ERR.print(f"[dim]{escape(deployment.model)} at {deployment.grpc}, {where}[/]")
                OUT.print(f"[bold]> {escape(prompt)}[/]")
                last = await _ask(deployment.grpc, prompt, max_tokens)
        assert last.usage is not None
        assert last.timings is not None
        assert last.finish_reason is not None
        OUT.print(f"[dim]{escape(summary_line(last.usage, last.timings, last.finish_reason))}[/]")

    launch.run(main)


async def _ask(address: str, prompt: str, max_tokens: int) -> Delta:
    """Stream the answer to the terminal; returns the last delta, which has the figures."""
    last: Delta | None = None
    async with AsyncClient(address) as client:
        messages = [{"role": "user", "content": prompt}]
        async for delta in client.stream(messages=messages, max_tokens=max_tokens, temperature=0.0):
            write_answer(delta.text)
            last = delta
    write_answer("\n")
    if last is None or last.timings is None:
        raise ProtocolError("the stream ended without its last message")
    return last
