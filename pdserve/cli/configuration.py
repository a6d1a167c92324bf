"""`pdserve config`: what a deployment would be told."""

from __future__ import annotations

import typer
import yaml

from pdserve.cli.console import OUT
from pdserve.cli.options import ConfigFile, Decode, ModelName, Prefill, Settings, build_config

config_app = typer.Typer(help="Show the configuration.", no_args_is_help=True)


@config_app.callback()
def _group() -> None:
    """Show the configuration."""


@config_app.command()
def show(
    config: ConfigFile = None,
    model: ModelName = None,
    prefill: Prefill = None,
    decode: Decode = None,
    settings: Settings = None,
) -> None:
    """Print the resolved configuration as YAML: defaults, then the file, then flags."""
    resolved = build_config(
        config,
        settings,
        {"model": {"model": model}, "prefill": {"workers": prefill}, "decode": {"workers": decode}},
    )
    OUT.out(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), end="", highlight=False)
