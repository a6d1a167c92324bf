"""Composition root: the one place that reads the environment and puts the parts of a deployment together.

`deployed` is a whole service: Ray, workers, supervisor and coordinator, started in order, and ended in
reverse with a bound whatever happened in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import uvloop

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from pdserve.cluster import kept_ray
from pdserve.cluster.keeper import KeeperSpec
from pdserve.cluster.placement import Node, PlacementPlan, most_ranks, plan_placement
from pdserve.cluster.ray_host import RayHost
from pdserve.cluster.ray_session import RaySession, close_session, join_kept, open_session
from pdserve.cluster.scaling import ClusterScaler
from pdserve.cluster.start_times import StartTimes
from pdserve.cluster.supervisor import Supervisor
from pdserve.cluster.worker_specs import HostedModel
from pdserve.core.config import ModelEntry, ServeConfig
from pdserve.core.errors import ConfigError, PdServeError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import PROTOCOL_VERSION
from pdserve.core.logs import BackgroundLog, handler_of
from pdserve.core.operation_settings import LogFormat
from pdserve.core.speculative_settings import SpeculativeMethod
from pdserve.models import store
from pdserve.worker.hosting import Progress

log = logging.getLogger(__name__)

T = TypeVar("T")

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WORKER_ENV: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set for this process and every worker, unless they are set already. Weights come from the model store."""
COORDINATOR_LOG: Final = "pdserve-coordinator.log"
"""In the folder of Ray's log files."""
STOP_GRACE_S: Final = 5.0
"""Ending the workers, and then Ray, gets at most this long; running requests get `coordinator.grace_s`."""
_SILENCE_PER_HEARTBEAT_TIMEOUT: Final = 2.0
"""The coordinator stops using a silent worker first; the supervisor then replaces its process."""
_LOOK_AT_NODES_S: Final = 2.0


class Report(Protocol):
    """Told of every step that takes time: of what, in words, and how far in [0, 1] when that is known."""

    def __call__(self, what: str, text: str, fraction: float | None = None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the process environment says that matters here."""

    cuda_visible_devices: str | None
    cuda_allocator: str
    """PyTorch's allocator settings for CUDA."""
    ray_auth_token: str | None
    ray_auth_token_path: str | None
    cache_dir: Path | None
    """PDSERVE_CACHE, or a folder of XDG_CACHE_HOME; None leaves it to the model store."""
    api_keys: str | None = field(default=None, repr=False)
    """PDSERVE_API_KEYS: what security.api_keys_file would hold."""


def read_environment() -> Environment:
    """Read it all, once."""
    get = os.environ.get
    cache, xdg = get("PDSERVE_CACHE"), get("XDG_CACHE_HOME")
    return Environment(
        cuda_visible_devices=get("CUDA_VISIBLE_DEVICES"),
        cuda_allocator=get("PYTORCH_ALLOC_CONF") or get("PYTORCH_CUDA_ALLOC_CONF") or "",
        ray_auth_token=get("RAY_AUTH_TOKEN"),
        ray_auth_token_path=get("RAY_AUTH_TOKEN_PATH"),
        cache_dir=Path(cache) if cache else Path(xdg, "pdserve") if xdg else None,
        api_keys=get("PDSERVE_API_KEYS") or None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A running service."""

    config: ServeConfig
    model: str
    """The name clients ask for; of several models the first one's."""
    models: tuple[ServedModel, ...]
    grpc: str
    metrics_port: int
    console_url: str | None
    dashboard_url: str | None
    dashboard_token_file: Path | None
    """The dashboard asks for what is in this file."""
    plan: PlacementPlan
    coordinator: Coordinator
    supervisors: tuple[Supervisor, ...]
    """One per model."""

    @property
    def supervisor(self) -> Supervisor:
        """The first model's."""
        return self.supervisors[0]


@contextlib.asynccontextmanager
async def deployed(config: ServeConfig, report: Report) -> AsyncIterator[Deployment]:
    """Start everything `config` asks for; on leaving, end all of it.

    Raises `ConfigError`, `CheckpointError`, `ModelNotFound` or `WorkerLost` when it cannot start; nothing is
    left running then. Run it on the main thread, or on one that lives as long.
    """
    environment = read_environment()
    refuse_slow_allocator(environment)
    _require_free_port("coordinator.port (--port)", config.coordinator.host, config.coordinator.port)
    hosted = [await asyncio.to_thread(hosted_model, one, environment, report) for one in config.of_each_model]
    served = served_models(config, hosted)
    identity = identity_of(config, [model.model_dir for model in hosted])
    async with contextlib.AsyncExitStack() as stack:
        session = _start_ray(config, environment, report, identity)
        stack.callback(close_session, session, grace_s=STOP_GRACE_S)
        stack.callback(_log_to_files(config, session).close)
        report("ray", "Ray runs", 1.0)
        plan = await _plan(config, session, report)
        coordinator = Coordinator(
            config, served, ray_targets=session.metrics_targets, keys=environment.api_keys
        )
        starts = StartTimes(coordinator.worker_started)
        host = RayHost(session, plan, config, hosted, _worker_progress(report, starts), identity)
        await host.reserve()
        stack.callback(host.release)
        supervisors = _supervisors(config, host, coordinator, served)
        stack.push_async_callback(_stop_all, supervisors)
        scaler = ClusterScaler(
            host,
            {model.name: team for model, team in zip(served, supervisors, strict=True)},
            place_timeout_s=config.planner.place_timeout_s,
        )
        stack.push_async_callback(scaler.stop)
        coordinator.scale_with(scaler)
        endpoints = await coordinator.start()
        stack.push_async_callback(coordinator.stop, config.coordinator.grace_s)
        await _start_all(supervisors)
        scaler.go_on()
        watching = asyncio.create_task(host.watch_nodes(), name="watch-nodes")
        stack.callback(watching.cancel)
        if session.keeper is not None:
            session.keeper.linger()
        yield Deployment(
            config=config,
            model=served[0].name,
            models=served,
            grpc=endpoints.grpc,
            metrics_port=endpoints.metrics_port,
            console_url=endpoints.console,
            dashboard_url=session.dashboard_url,
            dashboard_token_file=_write_token(session) if session.local else None,
            plan=plan,
            coordinator=coordinator,
            supervisors=supervisors,
        )


def _supervisors(
    config: ServeConfig, host: RayHost, coordinator: Coordinator, served: Sequence[ServedModel]
) -> tuple[Supervisor, ...]:
    """One per model."""
    return tuple(
        Supervisor(
            host,
            _CoordinatorRegistry(coordinator, model.name),
            [slot for slot in host.slots if slot.model == index],
            ping_timeout_s=_SILENCE_PER_HEARTBEAT_TIMEOUT * config.coordinator.heartbeat_timeout_s,
            # Workers that died while nobody watched leave peers that remember an epoch we cannot know.
            epochs_before=int(time.time()) if host.num_left else 0,
        )
        for index, model in enumerate(served)
    )


async def _plan(config: ServeConfig, session: RaySession, report: Report) -> PlacementPlan:
    """Where workers go; on a cluster that we joined, once it has nodes enough. Raises `ConfigError`."""
    patience_s = 0.0 if session.local else config.cluster.join_timeout_s
    give_up = time.monotonic() + patience_s
    while True:
        try:
            return plan_placement(config, session.nodes())
        except ConfigError as error:
            if time.monotonic() >= give_up:
                raise
            report("ray", f"waiting for nodes: {error}")
        # Ray tells of no node that joins: it has to be asked.
        await asyncio.sleep(_LOOK_AT_NODES_S)


def hosted_model(config: ServeConfig, environment: Environment, report: Report) -> HostedModel:
    """Where the files of a configuration's one model are, fetched on first use."""
    return HostedModel(
        config=config,
        model_dir=resolve_model(config, environment, report),
        draft_model_dir=resolve_draft_model(config, environment, report),
    )


def served_models(config: ServeConfig, hosted: Sequence[HostedModel]) -> tuple[ServedModel, ...]:
    """What the coordinator must know of each. Raises `CheckpointError` or `ConfigError`."""
    entries = config.models or (ModelEntry(),)
    return tuple(
        ServedModel.from_dir(
            model.model_dir,
            name=next(iter(model.config.model.served_names), None),
            aliases=model.config.model.served_names[1:],
            max_model_len=model.config.model.max_model_len,
            classes=entry.classes,
            default_class=entry.default_class,
        )
        for model, entry in zip(hosted, entries, strict=True)
    )


async def _start_all(supervisors: Sequence[Supervisor]) -> None:
    """All at once; the first that fails ends the others' starts."""
    try:
        async with asyncio.TaskGroup() as group:
            for supervisor in supervisors:
                group.create_task(supervisor.start())
    except* PdServeError as failures:
        raise failures.exceptions[0] from None


async def _stop_all(supervisors: Sequence[Supervisor]) -> None:
    await asyncio.gather(*(supervisor.stop(STOP_GRACE_S) for supervisor in supervisors))


async def try_ray(config: ServeConfig) -> list[Node]:
    """Start (or join) Ray as `deployed` would, look at its nodes, and leave. Raises `ConfigError`."""
    cluster = config.cluster.model_copy(update={"dashboard": False, "linger_s": 0.0})
    quiet = config.model_copy(update={"cluster": cluster})
    session = _start_ray(quiet, read_environment(), _silent)
    try:
        return session.nodes()
    finally:
        close_session(session, grace_s=STOP_GRACE_S)


def resolve_model(config: ServeConfig, environment: Environment, report: Report) -> Path:
    """The Hugging Face directory of the configured model, fetched and converted on first use."""
    return _resolve(config.model.model, environment, report)


def resolve_draft_model(config: ServeConfig, environment: Environment, report: Report) -> Path | None:
    """That of the model that guesses in speculative decoding; None where none does."""
    speculative = config.speculative
    if speculative.method is not SpeculativeMethod.DRAFT_MODEL or speculative.model is None:
        return None
    return _resolve(speculative.model, environment, report)


def _resolve(model: str, environment: Environment, report: Report) -> Path:
    def progress(fraction: float, text: str) -> None:
        report("model", text, fraction)

    return store.resolve(model, progress, cache_dir=environment.cache_dir)


def pull_model(name: str | None, report: Report) -> Path:
    """Fetch a model of the catalogue, the default one for None."""
    chosen = name or store.DEFAULT_MODEL
    return store.pull(
        chosen,
        lambda fraction, text: report("model", text, fraction),
        cache_dir=read_environment().cache_dir,
    )


def list_models() -> list[store.ModelEntry]:
    """The models that can be named."""
    return store.list_models(cache_dir=read_environment().cache_dir)


def inspect_model(config: ServeConfig) -> tuple[Path, str]:
    """Where the configured model is and what it is, from its headers. Raises `CheckpointError`, and
    `ConfigError` for a `tensor_parallel_size` that does not divide it."""
    # Here, not at the top: both import torch, which only workers and this need.
    from pdserve.models.checkpoint import Checkpoint
    from pdserve.models.hf_config import read_config
    from pdserve.models.sharding import require_shardable

    path = resolve_model(config, read_environment(), _silent)
    model = read_config(path)
    for role in (config.prefill, config.decode):
        require_shardable(model, role.tensor_parallel_size)
    with Checkpoint.open(path) as checkpoint:
        gigabytes = checkpoint.total_bytes / 1e9
    form = model.dtype if model.quantization is None else model.quantization.name
    return path, f"{model.architecture}, {model.num_layers} layers, {form}, {gigabytes:.2f} GB"


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` to its end, or until SIGINT, SIGTERM or SIGHUP cancels it: then raise KeyboardInterrupt.

    A second signal ends the process at once; the kernel takes a local cluster along.
    """

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        received: list[int] = []

        def on_signal(number: int) -> None:
            if received:
                os._exit(128 + number)
            received.append(number)
            task.cancel()

        for name in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(name, on_signal, name)
        try:
            return await main()
        except asyncio.CancelledError:
            if received:
                raise KeyboardInterrupt from None
            raise

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(guarded())


def _silent(what: str, text: str, fraction: float | None = None) -> None:
    """A `Report` that says nothing."""


def identity_of(config: ServeConfig, model_dirs: Sequence[Path]) -> str:
    """What a worker was started with, in one word: with the same, the next launcher can take it over."""
    settings = config.model_dump_json(
        exclude={"coordinator": True, "cluster": {"dashboard", "dashboard_port"}, "seed": True}
    )
    where = " ".join(str(model_dir.resolve()) for model_dir in model_dirs)
    described = f"{PROTOCOL_VERSION} {where} {settings}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _start_ray(
    config: ServeConfig, environment: Environment, report: Report, identity: str = ""
) -> RaySession:
    local = config.cluster.address == "local"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name, value in _WORKER_ENV.items():
        os.environ.setdefault(name, value)
    own_token = local and environment.ray_auth_token is None and environment.ray_auth_token_path is None
    kept = local and config.cluster.linger_s > 0
    if kept:
        # What Ray does by itself for a cluster that it starts, and not when it joins one.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if kept and (keeper := kept_ray.claim(identity, config.coordinator.port)):
        report("ray", f"taking over the deployment in {keeper.ray.run_dir}")
        if keeper.ray.auth_token is not None:
            os.environ["RAY_AUTH_TOKEN"] = keeper.ray.auth_token
        return join_kept(keeper)
    report("ray", "starting Ray on this machine" if local else f"joining Ray at {config.cluster.address}")
    if own_token:
        # Ray would write a token into the home directory, for every cluster of this user, and say so.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    num_cpus = max(usable_cores(), most_ranks(config) * (config.cluster.cpus_per_worker or 1))
    if kept:
        spec = KeeperSpec(
            settings=config.cluster,
            num_cpus=num_cpus,
            identity=identity,
            port=config.coordinator.port,
            auth_token=os.environ["RAY_AUTH_TOKEN"] if own_token else None,
        )
        return join_kept(kept_ray.start(spec))
    return open_session(config.cluster, num_cpus=num_cpus, worker_env={n: os.environ[n] for n in _WORKER_ENV})


def usable_cores() -> int:
    """Cores this process may run on; a container often gets fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _log_to_files(config: ServeConfig, session: RaySession) -> BackgroundLog:
    """Beside the workers' files, so that Ray's dashboard shows it; and as JSON to the terminal if wanted."""
    settings = config.logging
    handlers: list[logging.Handler] = []
    if session.log_dir is not None and os.access(session.log_dir, os.W_OK):
        handlers.append(handler_of(settings, origin="coordinator", file=session.log_dir / COORDINATOR_LOG))
    if settings.format is LogFormat.HUMAN:
        return BackgroundLog(settings, handlers)
    handlers.append(handler_of(settings, origin="coordinator"))
    return BackgroundLog(settings, handlers, muted=tuple(logging.getLogger().handlers))


def _write_token(session: RaySession) -> Path | None:
    token = os.environ.get("RAY_AUTH_TOKEN")
    if token is None or session.dashboard_url is None:
        return None
    path = session.run_dir.path / "dashboard-token"
    path.touch(mode=0o600)
    path.write_text(token)
    return path


def _worker_progress(report: Report, starts: StartTimes) -> Callable[[WorkerId, Progress], None]:
    def told(worker: WorkerId, progress: Progress) -> None:
        report(str(worker), progress.text, progress.fraction)
        starts.told(worker, progress)

    return told


def refuse_slow_allocator(environment: Environment) -> None:
    """Raise `ConfigError` when the CUDA allocator is set to memory that peers cannot open."""
    if "expandable_segments:true" in environment.cuda_allocator.lower().replace(" ", ""):
        raise ConfigError(
            "PYTORCH_CUDA_ALLOC_CONF asks for expandable_segments, which makes KV transfers between GPUs "
            "hundreds of times slower; unset it"
        )


def _require_free_port(knob: str, host: str, port: int) -> None:
    """Fail in a millisecond rather than after Ray and the model have started."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{knob}: cannot listen on {host}:{port}: {error.strerror}; choose another"
            ) from error


@dataclass(frozen=True, slots=True)
class _CoordinatorRegistry:
    """The coordinator as the supervisor sees it."""

    coordinator: Coordinator
    model: str

    async def add(self, address: str) -> None:
        await self.coordinator.add_worker(address, model=self.model)

    async def remove(self, worker: WorkerId, why: str) -> None:
        await self.coordinator.remove_worker(worker, why)

    def is_up(self, worker: WorkerId) -> bool:
        return any(
            entry.id == worker and (entry.up or entry.redialling)
            for entry in self.coordinator.snapshot().workers
        )
