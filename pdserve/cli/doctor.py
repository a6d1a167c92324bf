"""`pdserve doctor`: is everything here that serving needs, and if not, what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from typing import Annotated, Final

import typer
from rich.markup import escape

from pdserve.cli.checks import SYSTEM_CHECKS, Finding, Status, bad, installed, ok, warn
from pdserve.cli.console import ERR, OUT
from pdserve.cli.options import ConfigFile, ModelName, Settings, build_config
from pdserve.core.config import ServeConfig
from pdserve.core.errors import PdServeError

_TRANSFER_TIMEOUT_S: Final = 30.0
_MARK: Final = {Status.OK: "[green]ok[/]  ", Status.WARN: "[yellow]warn[/]", Status.FAIL: "[bold red]FAIL[/]"}


def doctor(
    config: ConfigFile = None,
    model: ModelName = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine: Python, torch, GPU, Ray, NIXL, shared memory, ports, model files.

    Moves a real block between two processes and starts a real Ray. Exit code 1 when something must be fixed.
    """
    resolved = build_config(config, settings, {"model": {"model": model}})
    findings = []
    for finding in _examine(resolved):
        findings.append(finding)
        if not as_json:
            _show(finding)
    failed = [finding for finding in findings if finding.status is Status.FAIL]
    if as_json:
        OUT.out(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2), highlight=False)
    elif failed:
        OUT.print(f"[bold red]{len(failed)} to fix[/]")
    else:
        OUT.print("[bold green]ready to serve[/]")
    if failed:
        raise typer.Exit(1)


def _examine(config: ServeConfig) -> Iterator[Finding]:
    for check in SYSTEM_CHECKS:
        yield check(config)
    with ERR.status("moving a block between two processes over NIXL"):
        finding = check_transfer(config)
    yield finding
    with ERR.status("starting Ray"):
        finding = check_ray(config)
    yield finding
    yield check_model(config)


def check_transfer(_: ServeConfig) -> Finding:
    missing = installed("nixl", "nixl-cu13", "nixl-cu12")
    if missing is not None:
        return missing
    from pdserve.cli.transfer_probe import probe_transfer  # imports NIXL's dependencies

    try:
        path = probe_transfer(_TRANSFER_TIMEOUT_S)
    except PdServeError as error:
        return bad("nixl", str(error), "see docs/transfer.md; `UCX_LOG_LEVEL=info pdserve doctor` says more")
    speed = "" if path.gigabytes_per_s is None else f" at {path.gigabytes_per_s:.1f} GB/s"
    small = "" if path.latency_s is None else f", 4 KiB in {1e6 * path.latency_s:.0f} us"
    found = f"a block moved between two processes over {path.path}{speed}{small}"
    if path.path == "tcp":
        return warn("nixl", found, "workers of one machine should share memory: see `process memory` above")
    return ok("nixl", found)


def check_ray(config: ServeConfig) -> Finding:
    missing = installed("ray", "ray")
    if missing is not None:
        return missing
    from pdserve import launch  # Ray takes a second to import

    version = importlib.metadata.version("ray")
    try:
        nodes = asyncio.run(launch.try_ray(config))
    except PdServeError as error:
        return bad("ray", f"{version}: {error}", "`pdserve -v doctor` shows Ray's own messages")
    gpus = sum(node.gpus for node in nodes)
    return ok("ray", f"{version}; {len(nodes)} node(s), {gpus:g} GPUs")


def check_model(config: ServeConfig) -> Finding:
    from pdserve import launch  # knows where the cache is

    name = config.model.model
    here = next((entry for entry in launch.list_models() if entry.name == name), None)
    if here is not None and here.path is None:
        return warn("model", f"{name} is not here yet", f"fetch it: pdserve models pull {name}")
    try:
        path, checkpoint = launch.inspect_model(config)
    except PdServeError as error:
        return bad("model", str(error), "name a checkpoint directory, a .gguf file or `pdserve models list`")
    return ok("model", f"{path}: {checkpoint}")


def _show(finding: Finding) -> None:
    OUT.print(f"{_MARK[finding.status]} [bold]{finding.check}[/]  {escape(finding.found)}")
    if finding.advice:
        OUT.print(f"       -> {escape(finding.advice)}")
