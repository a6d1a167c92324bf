"""`pdserve serve`: run a deployment until it is told to stop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pdserve.cli.console import ERR, Reporter
from pdserve.cli.options import ConfigFile, Decode, ModelName, Prefill, Settings, build_config
from pdserve.core.config import DType, RoutingPolicy, ServeConfig

if TYPE_CHECKING:
    from pdserve.launch import Deployment


def serve(
    model: ModelName = None,
    prefill: Prefill = None,
    decode: Decode = None,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", help="gRPC port; 0 picks a free one.")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; its directory's name by default.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="What weights and KV cache are computed in; auto: as the checkpoint.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt + answer in tokens; the checkpoint's own by default.")
    ] = None,
    policy: Annotated[RoutingPolicy | None, typer.Option(help="How workers are chosen.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="local: start Ray here; auto or host:port: join a cluster.")
    ] = None,
    accelerator_type: Annotated[
        str | None, typer.Option(help="Only nodes with this GPU, as Ray names it: H100, A100 ...")
    ] = None,
    dashboard: Annotated[bool | None, typer.Option(help="Ray's dashboard on port 8265.")] = None,
    settings: Settings = None,
) -> None:
    """Serve a model: start workers and listen for gRPC requests until Ctrl-C.

    Without any option: the embedded default model, one prefill and one decode worker, on this machine.
    """
    run_service(
        build_config(
            config,
            settings,
            {
                "model": {
                    "model": model,
                    "served_model_name": served_model_name,
                    "dtype": dtype,
                    "max_model_len": max_model_len,
                },
                "prefill": {"workers": prefill},
                "decode": {"workers": decode},
                "coordinator": {"host": host, "port": port, "policy": policy},
                "cluster": {
                    "address": ray_address,
                    "accelerator_type": accelerator_type,
                    "dashboard": dashboard,
                },
            },
        )
    )


def run_service(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; a start that fails raises its typed error."""
    # Here, not at the top: Ray takes a second to import, which `--help` should not.
    from pdserve import launch

    async def main() -> None:
        with Reporter() as report:
            async with launch.deployed(config, report) as deployment:
                report.close()
                _announce(deployment)
                await _until_told_to_stop()
                ERR.print("stopping: no new requests; those that run get a few seconds")
        ERR.print("stopped")

    launch.run(main)


async def _until_told_to_stop() -> None:
    """A signal cancels us: here, and only here, that is the normal end."""
    task = asyncio.current_task()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if task is not None:
            task.uncancel()


def _announce(deployment: Deployment) -> None:
    plan = deployment.plan
    where = f"{plan.gpus_per_worker:g} GPU" if plan.uses_gpus else f"{plan.cpus_per_worker} core"
    for index, model in enumerate(deployment.models):
        prefill, decode = (sum(slot.model == index for slot in role) for role in (plan.prefill, plan.decode))
        names = model.name + (f" (also {', '.join(model.aliases)})" if model.aliases else "")
        workers = f"{prefill} prefill + {decode} decode workers, {where} each"
        ERR.print(f"[bold green]ready[/]  {escape(names)}: {workers}")
    ERR.print(f"  gRPC       {deployment.grpc}")
    ERR.print(f"  metrics    http://127.0.0.1:{deployment.metrics_port}/metrics")
    if deployment.console_url:
        ERR.print(f"  console    {deployment.console_url}")
    if deployment.dashboard_url:
        token = deployment.dashboard_token_file
        ERR.print(f"  dashboard  {deployment.dashboard_url}" + (f" (its token: {token})" if token else ""))
    address = "" if deployment.grpc == "127.0.0.1:50051" else f" --address {deployment.grpc}"
    named = f" --model {deployment.model}" if len(deployment.models) > 1 else ""
    ERR.print(f'  ask it     pdserve generate "Why is the sky blue?"{escape(named)}{address}')
    ERR.print("  stop it    Ctrl-C")
