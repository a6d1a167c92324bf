"""`pdserve drain` and `pdserve undrain`: take a worker out of use without losing a request, and back."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from pdserve.cli.access import access
from pdserve.cli.console import ERR
from pdserve.cli.generate import DEFAULT_ADDRESS
from pdserve.client.admin import drain as drain_worker
from pdserve.client.admin import undrain as undrain_worker


def drain(
    worker: Annotated[str, typer.Argument(help="Its name, such as decode-0.")],
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds after which what could not move starts over on another worker."),
    ] = None,
) -> None:
    """Take a worker out of use; its requests move to other workers, with their KV.

    Streams see a pause at most. Returns when nothing is left there and its process may be ended.
    """
    with ERR.status(f"draining {escape(worker)}") as status:
        for progress in drain_worker(address, worker, timeout_s=timeout, access=access()):
            status.update(f"draining {escape(worker)}: {progress.requests_left} requests left")
    ERR.print(f"{escape(worker)} is drained")


def undrain(
    worker: Annotated[str, typer.Argument(help="Its name, such as decode-0.")],
    address: Annotated[
        str, typer.Option("--address", "-a", help="host:port of the service.")
    ] = DEFAULT_ADDRESS,
) -> None:
    """Put a drained worker back into use."""
    undrain_worker(address, worker, access=access())
    ERR.print(f"{escape(worker)} takes requests again")
