"""How commands get into a service that asks who is there: options before the command, or the environment."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Final

import typer

from pdserve.client import Access
from pdserve.client.channel import OPEN_ACCESS

_PANEL: Final = "Reaching a service that is secured"

ApiKey = Annotated[
    str | None,
    typer.Option(envvar="PDSERVE_API_KEY", help="The key to send.", rich_help_panel=_PANEL, metavar="KEY"),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="PDSERVE_TLS_CA",
        help="TLS: the authority (PEM) of its certificate; or write the address as grpcs://host:port.",
        rich_help_panel=_PANEL,
        metavar="FILE",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        envvar="PDSERVE_TLS_CERT",
        help="Mutual TLS: our certificate (PEM).",
        rich_help_panel=_PANEL,
        metavar="FILE",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        envvar="PDSERVE_TLS_KEY", help="Mutual TLS: its key (PEM).", rich_help_panel=_PANEL, metavar="FILE"
    ),
]


_SAID: Final[ContextVar[Access]] = ContextVar("access", default=OPEN_ACCESS)


def remember(said: Access) -> None:
    """Called with the options before a command, before it runs."""
    _SAID.set(said)


def access() -> Access:
    """What the options before the running command say."""
    return _SAID.get()
