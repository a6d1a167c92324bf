"""`pdserve plan`: how many workers of each role the load wants, and why."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from pdserve.cli.access import access
from pdserve.cli.console import ERR, OUT
from pdserve.cli.generate import DEFAULT_ADDRESS
from pdserve.client.admin import plan as ask


def plan(
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
) -> None:
    """What the planner proposes: the split of workers it wants, what that would bring, and why.

    planner.mode in the configuration turns it on; `active` lets it change roles by itself, and add and retire
    workers within its limits. Shows those that come and go, too.
    """
    answer = ask(address, access=access())
    if not answer.proposals:
        ERR.print(f"nothing is planned (planner.mode is {answer.mode})")
        return
    for one in answer.proposals:
        now, wanted = (
            f"{prefill} prefill + {decode} decode"
            for prefill, decode in ((one.prefill, one.decode), (one.wanted_prefill, one.wanted_decode))
        )
        OUT.print(f"[bold]{escape(one.model)}[/]: {one.standing} ({answer.mode})")
        OUT.print(f"  now        {now}, {one.capacity:.2f} requests/s in time")
        OUT.print(f"  wanted     {wanted}, {one.wanted_capacity:.2f} requests/s in time")
        if one.change:
            OUT.print(f"  next       {escape(one.change)}")
            OUT.print(f"  gain       {one.gain:.1%} ± {one.uncertainty:.1%} of the requests")
        OUT.print(f"  why        {escape(one.reason)}")
        for change in one.changes:
            what = f"{change.worker} ({change.role}) {change.state}{': ' if change.text else ''}{change.text}"
            OUT.print(f"  workers    {escape(what)}")
