"""`pdserve deploy`: from one small file to what Kubernetes is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.console import ERR, OUT
from pdserve.core.errors import ConfigError

deploy_app = typer.Typer(help="Describe a deployment for Kubernetes.", no_args_is_help=True)


@deploy_app.callback()
def _group() -> None:
    """Describe a deployment for Kubernetes."""


@deploy_app.command()
def render(
    file: Annotated[
        Path, typer.Argument(help="What to deploy where; deploy/sizes/ has examples.", metavar="FILE")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write here instead of to the terminal.", metavar="FILE"),
    ] = None,
) -> None:
    """Print the manifests of a deployment: pdserve deploy render FILE | kubectl apply -f -

    Refuses what cannot work, such as more workers than the machines have room for.
    """
    # Here, not at the top: they import Ray, which `--help` should not.
    from pdserve.deploy.render import render as manifests
    from pdserve.deploy.render import resolved, to_yaml
    from pdserve.deploy.settings import load_deployment

    deploy = load_deployment(file)
    text = to_yaml(manifests(deploy))
    _, plan = resolved(deploy)
    if out is None:
        OUT.out(text, end="", highlight=False)
    else:
        try:
            out.write_text(text)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}") from error
    machines = sum(machine.count for machine in deploy.machines)
    where = "1 machine" if machines == 1 else f"{machines} machines and a head"
    ERR.print(f"{len(plan.prefill)} prefill + {len(plan.decode)} decode workers on {where}")
