"""`pdserve models`: the checkpoints that are here, and fetching the ones that are not."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from pdserve.cli.console import OUT, Reporter, print_table
from pdserve.cli.summary import size

models_app = typer.Typer(help="List and fetch models.", no_args_is_help=True)


@models_app.command("list")
def list_() -> None:
    """Show the models that can be named, and where they are. Any checkpoint directory can be served too."""
    from pdserve import launch  # knows where the cache is; Ray takes a second to import

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "size", "where", "source"):
        table.add_column(column, overflow="fold")
    for entry in launch.list_models():
        here = entry.path is not None
        table.add_row(
            entry.name,
            size(entry.size_bytes) if here else "-",
            str(entry.path) if here else "not here yet: pdserve models pull",
            entry.source,
        )
    print_table(table)


@models_app.command()
def pull(
    name: Annotated[
        str | None, typer.Argument(help="A name from `pdserve models list`; the default model when left out.")
    ] = None,
) -> None:
    """Fetch a model into the cache and convert it; prints its directory."""
    from pdserve import launch  # knows where the cache is; Ray takes a second to import

    with Reporter() as report:
        path = launch.pull_model(name, report)
    OUT.out(str(path), highlight=False)
