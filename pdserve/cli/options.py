"""Flags that several commands share, and how they become a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from pdserve.core.config import ServeConfig, load_config
from pdserve.core.errors import ConfigError

Overrides = dict[str, dict[str, Any]]

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file; every key is in docs/configuration.md.", metavar="FILE"),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A Hugging Face checkpoint directory, a .gguf file, or a name from `pdserve models list`.",
    ),
]
Prefill = Annotated[
    int | None,
    typer.Option("--prefill", help="Workers that read prompts; 0 lets decode workers read them too."),
]
Decode = Annotated[int | None, typer.Option("--decode", help="Workers that write answers.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other key of the configuration, such as cache.block_size=32; may be repeated.",
        metavar="SECTION.KEY=VALUE",
    ),
]


def parse_settings(settings: list[str] | None) -> Overrides:
    """`section.key=value` strings as overrides; values are YAML. Raises `ConfigError`."""
    overrides: Overrides = {}
    for setting in settings or []:
        path, equals, value = setting.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"--set {setting}: wanted SECTION.KEY=VALUE, such as cache.block_size=32")
        try:
            overrides.setdefault(section, {})[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: {error}") from error
    return overrides


def build_config(path: Path | None, settings: list[str] | None, flags: Overrides) -> ServeConfig:
    """File, then `--set`, then flags that were given (None: not given). Raises `ConfigError`."""
    overrides = parse_settings(settings)
    for section, fields in flags.items():
        given = {name: value for name, value in fields.items() if value is not None}
        overrides.setdefault(section, {}).update(given)
    return load_config(path, overrides)
