"""The coordinator: one asyncio process between clients and workers."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer  # `health.aio`, which the stubs do not know

from coordinator.admin import Admin
from coordinator.book import RegistrySettings
from coordinator.console.server import Console, is_loopback
from coordinator.console.watch import ConsoleWatch
from coordinator.dispatcher import Dispatcher
from coordinator.edge import api_keys, listen, web_tls
from coordinator.events import Event
from coordinator.fleet import WorkerState
from coordinator.gateway import SERVICE, Gateway, GatewaySettings
from coordinator.metrics import Metrics
from coordinator.metrics_server import MetricsServer
from coordinator.models import LoadedModel, ServedModel
from coordinator.planner.control import PlannerControl
from coordinator.planner.resizing import Resizing, Scaler
from coordinator.recording import RecordingRegistry
from coordinator.registry import Registry
from coordinator.router import Router
from coordinator.snapshot import CoordinatorSnapshot, take_snapshot
from coordinator.standby import Standbys
from coordinator.tracing import RequestTracer, make_tracer
from coordinator.workers import dial
from pdserve.core.config import CoordinatorSettings, ServeConfig
from pdserve.core.errors import ConfigError, FingerprintMismatch, ModelNotFound, ProtocolError, WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role, WorkerInfo
from pdserve.core.operation_settings import PlannerMode
from pdserve.core.sampling import SamplingLimits
from pdserve.core.tls import dialling

log = logging.getLogger(__name__)

_TOKENISER_THREADS: Final = 2
_FIRST_REDIAL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Endpoints:
    grpc: str
    """host:port"""
    metrics_port: int
    console: str | None = None
    """URL of the web page; None: there is none."""


class Coordinator:
    """`start` and everything after it on one running event loop.

    A worker that falls silent gets no more requests, and its requests go on elsewhere; but its peers keep the
    blocks it may still write to until `remove_worker` says that its process has ended.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Sequence[ServedModel],
        *,
        ray_targets: Path | None = None,
        keys: str | None = None,
    ) -> None:
        """ray_targets: where Ray says which of its nodes export metrics, for Prometheus.

        keys: API keys as their file would have them, from elsewhere. Raises `ConfigError` for wrong ones.
        """
        self._keys = api_keys(config.security, keys)
        self._tls = dialling(config.security.cluster_tls)
        self._ray_targets = ray_targets
        if not models:
            raise ConfigError("a coordinator needs at least one model")
        names = [name for model in models for name in model.names]
        if len(set(names)) != len(names):
            raise ConfigError(f"model names must differ, got {', '.join(names)}")
        self._config, self._served = config, tuple(models)
        self._metrics = Metrics(config.cost)
        self._metrics.queue_limit.set(config.coordinator.max_queued_requests)
        for name in names:
            self._metrics.serves(name)
        self._tokenisers = ThreadPoolExecutor(_TOKENISER_THREADS, thread_name_prefix="tokenise")
        self._health = HealthServicer()
        self._running: _Running | None = None
        self._resizing: Resizing | None = None
        self._addresses: dict[WorkerId, tuple[str, str]] = {}
        """Where each worker listens, and its model."""
        self._tasks: set[asyncio.Task[None]] = set()

    def scale_with(self, scaler: Scaler) -> None:
        """Who starts and ends workers, for operators and for the planner. Call it before `start`."""
        names = {name: model.name for model in self._served for name in model.names}
        self._resizing = Resizing(scaler, self._config.planner, names)

    async def start(self) -> Endpoints:
        """Load tokenizers and listen. Raises `CheckpointError`, or `ConfigError` when a port is taken."""
        loaded = await asyncio.gather(*(asyncio.to_thread(LoadedModel.load, m) for m in self._served))
        models = {name: model for model in loaded for name in model.served.names}
        settings = self._config.coordinator
        tracer = make_tracer(self._config.tracing)
        plans, watch, standbys = self._planners(), ConsoleWatch(), self._standbys()
        dispatcher = Dispatcher(
            make_registry(self._config, record=settings.record),
            self._metrics,
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
            step_timeout_s=settings.step_timeout_s,
            tracer=tracer,
            watchers=(watch, standbys) if plans is None else (watch, standbys, plans),
            on_connection_lost=self._connection_lost,
            on_workers_changed=self._workers_changed,
        )
        gateway = Gateway(dispatcher, models, _gateway_settings(settings), self._metrics, self._tokenisers)
        server, port = listen(
            settings,
            self._config.security,
            self._keys,
            gateway,
            Admin(dispatcher, plans, self._resizing),
            self._health,
        )
        metrics_server = _serve_metrics(settings, self._metrics, self._ray_targets)
        console = Console(
            dispatcher, watch, self._keys, tuple if plans is None else plans.proposals, standbys.stands_by
        )
        self._running = _Running(dispatcher, server, metrics_server, tracer, console)
        console_url = await self._start_console(console)
        await server.start()
        await self._update_health()
        return Endpoints(f"{settings.host}:{port}", metrics_server.port, console_url)

    async def _start_console(self, console: Console) -> str | None:
        settings, tls = self._config.coordinator, web_tls(self._config.security)
        if settings.console_port is None:
            return None
        if self._keys is None and not is_loopback(settings.console_host):
            raise ConfigError(
                f"coordinator.console_host: {settings.console_host} is open to others, and the console shows "
                "what goes on: set security.api_keys_file too"
            )
        port = await console.start(settings.console_host, settings.console_port, tls)
        return f"{'http' if tls is None else 'https'}://{settings.console_host}:{port}/"

    def _standbys(self) -> Standbys:
        # Models that the configuration does not name have no standby.
        models = zip(self._served, self._config.of_each_model, strict=False)
        wanted = {served.name: config.decode.standby for served, config in models}
        if any(wanted.values()) and self._config.planner.mode is PlannerMode.ACTIVE:
            raise ConfigError("decode.standby: planner.mode=active gives every worker its role; choose one")
        return Standbys(wanted)

    def _planners(self) -> PlannerControl | None:
        settings = self._config.planner
        if settings.mode is PlannerMode.OFF:
            return None
        names = [model.name for model in self._served]
        return PlannerControl(names, settings, self._config.coordinator, self._metrics, self._resizing)

    async def add_worker(self, address: str, *, model: str | None = None) -> WorkerInfo:
        """Dial a worker and put it to use; one of the same name is taken to be replaced, its process ended.

        `model` may stay None while one model is served. Raises `WorkerLost`, `ProtocolError`,
        `ModelNotFound`, and `FingerprintMismatch` for a worker that does not fit the others of its model.
        """
        running = self._require_running()
        name = self._model_name(model)
        channel, info, rest = await dial(address, sender="coordinator", tls=self._tls)
        try:
            for peer in running.dispatcher.registry.fleet:
                if peer.model == name and peer.id != info.worker:
                    info.fingerprint.require_same(peer.info.fingerprint, peer=peer.id)
        except FingerprintMismatch:
            channel.abort()
            raise
        self._addresses[info.worker] = (address, name)
        running.dispatcher.worker_joined(channel, info, name, rest)
        return info

    def worker_started(self, worker_id: WorkerId, seconds: Mapping[str, float]) -> None:
        """How long each phase of its start took, for the metrics."""
        self._metrics.worker_started(worker_id, seconds)

    async def remove_worker(self, worker_id: WorkerId, why: str) -> None:
        """The worker's process has ended for certain: its requests go on elsewhere. Unknown ids: nothing."""
        self._require_running().dispatcher.worker_gone(worker_id, why)

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let the others finish for `grace_s` seconds, end what is left, close."""
        running, self._running = self._running, None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if running is not None:
            await self._health.enter_graceful_shutdown()
            refusing = asyncio.create_task(running.server.stop(grace_s + 1.0))
            await running.dispatcher.stop(grace_s)
            if isinstance(running.dispatcher.registry, RecordingRegistry):
                running.dispatcher.registry.close()
            await refusing
            await running.console.stop()
            await asyncio.to_thread(running.metrics_server.close)
            if running.tracer is not None:
                await asyncio.to_thread(running.tracer.close)
        self._tokenisers.shutdown(cancel_futures=True)

    def handle(self, event: Event) -> None:
        """Something an operator wants, such as `DrainWorker` or `ChangeWorkerRole`. On the running loop."""
        self._require_running().dispatcher.handle(event)

    def snapshot(self) -> CoordinatorSnapshot:
        """What is going on, for the command line and for tests."""
        return take_snapshot(self._require_running().dispatcher.registry)

    def _workers_changed(self) -> None:
        self._start(self._update_health())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _connection_lost(self, info: WorkerInfo) -> None:
        """Try again: the process may well live. Until that has failed, nobody needs to end it."""
        state = None if self._running is None else self._running.dispatcher.registry.fleet.get(info.worker)
        if state is not None and info.worker in self._addresses:
            state.redialling = True
            self._start(self._redial(state, *self._addresses[info.worker]))

    async def _redial(self, state: WorkerState, address: str, model: str) -> None:
        deadline = asyncio.get_running_loop().time() + self._config.coordinator.heartbeat_timeout_s
        pause_s = _FIRST_REDIAL_S
        while self._running is not None and asyncio.get_running_loop().time() < deadline:
            running = self._running
            if running.dispatcher.registry.fleet.get(state.id) is not state or state.up:
                return  # its process has ended, or somebody was faster
            try:
                left_s = max(deadline - asyncio.get_running_loop().time(), 0.01)
                channel, info, rest = await dial(
                    address, sender="coordinator", tls=self._tls, timeout_s=left_s
                )
            except (WorkerLost, ProtocolError) as error:
                log.warning("worker %s does not answer again: %s", state.id, error)
                await asyncio.sleep(pause_s)
                pause_s *= 2
                continue
            current = running.dispatcher.registry.fleet.get(state.id) is state
            if self._running is running and current and info.epoch == state.info.epoch:
                running.dispatcher.worker_joined(channel, info, model, rest)
            else:
                channel.abort()
            return
        state.redialling = False

    async def _update_health(self) -> None:
        """Serving: a decode worker is up. Models by name; the whole server when every model is."""
        if self._running is None:
            return
        fleet = self._running.dispatcher.registry.fleet
        up = {name: bool(fleet.of(model.name, Role.DECODE)) for model in self._served for name in model.names}
        for name, serving in itertools.chain(up.items(), ((n, all(up.values())) for n in ("", SERVICE))):
            status = "SERVING" if serving else "NOT_SERVING"
            await self._health.set(name, health_pb2.HealthCheckResponse.ServingStatus.Value(status))

    def _model_name(self, model: str | None) -> str:
        names = [served.name for served in self._served]
        if model is None and len(names) == 1:
            return names[0]
        if model not in names:
            raise ModelNotFound(str(model), names)
        return model

    def _require_running(self) -> _Running:
        if self._running is None:
            raise ConfigError("the coordinator is not running; start it first")
        return self._running


@dataclass(frozen=True, slots=True)
class _Running:
    dispatcher: Dispatcher
    server: grpc.aio.Server
    metrics_server: MetricsServer
    tracer: RequestTracer | None
    console: Console


def make_registry(config: ServeConfig, *, record: str | None = None) -> Registry:
    """As the configuration has it; `record`: a file for what it is told. Raises `ConfigError`."""
    settings = config.coordinator
    router = Router(settings.policy, config.seed, settings.local_prefill, settings.whole_on_prefill)
    if record is None:
        return Registry(_registry_settings(config), router)
    return RecordingRegistry(_registry_settings(config), router, Path(record), config.model_dump_json())


def _registry_settings(config: ServeConfig) -> RegistrySettings:
    return RegistrySettings(
        max_queued_requests=config.coordinator.max_queued_requests,
        max_attempts=config.coordinator.max_attempts,
        admission=config.coordinator.admission,
        tenants=config.coordinator.tenants,
        queue_ttl_s=config.coordinator.queue_ttl_s,
        preemption=config.coordinator.preemption,
        fetch_prefixes=config.coordinator.fetch_prefixes,
        max_preemptions=config.coordinator.max_preemptions,
        explain_last=config.coordinator.explain_last,
        lease_s=config.transfer.lease_s,
        transfer_deadline_s=config.transfer.deadline_s,
        drain_timeout_s=config.coordinator.drain_timeout_s,
    )


def _gateway_settings(settings: CoordinatorSettings) -> GatewaySettings:
    return GatewaySettings(
        default_max_tokens=settings.default_max_tokens,
        default_timeout_s=settings.default_timeout_s,
        max_attempts=settings.max_attempts,
        limits=SamplingLimits(),
        classes=settings.classes,
        default_class=settings.default_class,
    )


def _serve_metrics(
    settings: CoordinatorSettings, metrics: Metrics, ray_targets: Path | None
) -> MetricsServer:
    try:
        return MetricsServer(metrics.registry, settings.host, settings.metrics_port, ray_targets)
    except OSError as error:
        where = f"{settings.host}:{settings.metrics_port}"
        raise ConfigError(f"coordinator.metrics_port: cannot listen on {where}: {error.strerror}") from error
