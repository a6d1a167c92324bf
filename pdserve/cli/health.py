"""`pdserve health`: for probes that can only run a command, such as a container's own."""

from __future__ import annotations

from typing import Annotated

import typer

from pdserve.cli.access import access
from pdserve.cli.console import OUT
from pdserve.cli.generate import DEFAULT_ADDRESS
from pdserve.client.health import is_serving


def health(
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
    model: Annotated[str, typer.Option("--model", "-m", help="One of several models; all by default.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
) -> None:
    """Say whether the service takes requests. Exit codes: 0 it does, 1 not (yet), 2 nobody answers."""
    serving = is_serving(address, model=model, timeout_s=timeout, access=access())
    OUT.print("serving" if serving else "not serving")
    if not serving:
        raise typer.Exit(1)
