"""`pdserve scale`: start or retire workers of a running service."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from pdserve.cli.access import access
from pdserve.cli.console import ERR
from pdserve.cli.generate import DEFAULT_ADDRESS
from pdserve.client.admin import scale as scale_workers

Count = Annotated[
    int | None, typer.Option(min=0, help="Workers of this role; as many as there are by default.")
]


def scale(
    prefill: Count = None,
    decode: Count = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Which one, where several are served.")] = "",
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
) -> None:
    """Have so many workers of each role: start more, or drain and end some.

    No stream is broken: what runs on a worker that goes moves to others, with its KV. A role changes where
    one has what the other lacks. On a Ray cluster with an autoscaler, nodes come and go with the workers.
    """
    if prefill is None and decode is None:
        raise typer.BadParameter("say how many: --prefill N, --decode M, or both")
    failed: list[str] = []
    now = "nothing was said"
    with ERR.status("asking") as shown:
        for status in scale_workers(address, model=model, prefill=prefill, decode=decode, access=access()):
            under_way = [f"{c.worker} {c.state}" for c in status.changes if c.state not in ("done", "failed")]
            now = f"{status.prefill} prefill + {status.decode} decode workers"
            shown.update(escape("; ".join([now, *under_way])))
            failed = [f"{c.worker}: {c.text}" for c in status.changes if c.state == "failed"]
    for line in failed:
        ERR.print(f"[red]{escape(line)}[/]")
    ERR.print(now)
    if failed:
        raise typer.Exit(1)
