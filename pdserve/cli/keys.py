"""`pdserve keys`: API keys for a service."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from coordinator.keys import KeyEntry, Scope, new_key
from pdserve.cli.console import ERR, OUT
from pdserve.core.errors import InvalidRequest

keys_app = typer.Typer(help="API keys for a service.", no_args_is_help=True)


@keys_app.callback()
def _group() -> None:
    """API keys for a service."""


@keys_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it will be; shown in logs.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What it may do; may be repeated. generate by default; admin includes the others."),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Its requests are this tenant's, with its limits and weight.")
    ] = None,
) -> None:
    """Make a key: its entry for security.api_keys_file to standard output, the key itself to the terminal.

    The key is shown this once; the file holds only its digest.
    """
    key, digest = new_key()
    entry: dict[str, object] = {"name": name, "sha256": digest}
    entry["scopes"] = [one.value for one in scope or [Scope.GENERATE]]
    if tenant is not None:
        entry["tenant"] = tenant
    try:
        KeyEntry.model_validate(entry)
    except ValueError as error:
        raise InvalidRequest(field="NAME", value=name, limit="64 letters, digits, dots and dashes") from error
    OUT.out(yaml.safe_dump([entry], sort_keys=False), end="", highlight=False)
    ERR.out(f"the key, shown once: {key}", highlight=False)
