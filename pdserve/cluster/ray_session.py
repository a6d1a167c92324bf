"""One connection to Ray: a cluster started on this machine and ended with us, or one that was there."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import ray

from pdserve.cluster.placement import Node, node_from_resources
from pdserve.cluster.run_dir import RunDir
from pdserve.core.config import ClusterSettings
from pdserve.core.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.cluster.kept_ray import KeeperLink

log = logging.getLogger(__name__)

NAMESPACE: Final = "pdserve"
_RAY_DIR: Final = "ray"
"""Below our own directory, because Ray opens the one it is given to everybody."""
_OBJECT_STORE_BYTES: Final = 100 * 1024 * 1024
"""KV and tokens travel elsewhere; the object store carries start-up messages only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySession:
    """A live connection. `run_dir` holds our sockets and, when local, everything Ray writes."""

    local: bool
    run_dir: RunDir
    log_dir: Path | None
    """Where this machine's Ray processes log."""
    dashboard_url: str | None
    node_id: str
    """Of the node this process runs on."""
    address: str
    """Where its head listens: what another process joins it by."""
    keeper: KeeperLink | None = None
    """Who owns a local Ray that outlives this process; None: it ends with us."""
    children: tuple[psutil.Process, ...] = ()
    """Processes that the session started; all are gone after `close_session`."""

    @property
    def metrics_targets(self) -> Path | None:
        """Ray's file of the nodes that export metrics, in Prometheus's format."""
        return (
            None if self.log_dir is None else self.log_dir.parents[1] / "prom_metrics_service_discovery.json"
        )

    def nodes(self) -> list[Node]:
        """The living machines of the cluster."""
        return [
            node_from_resources(entry["NodeID"], entry["NodeManagerAddress"], entry["Resources"])
            for entry in ray.nodes()  # type: ignore[no-untyped-call]  # Ray's own gap
            if entry["Alive"]
        ]


def open_session(
    settings: ClusterSettings, *, num_cpus: int, worker_env: Mapping[str, str] | None = None
) -> RaySession:
    """Start or join a Ray cluster; blocks for 3 to 10 seconds. Raises `ConfigError` when none answers.

    Call it from the main thread, or one that outlives the session: Ray's processes end with their starter.
    `worker_env`: set for workers on a joined cluster; a local one inherits ours.
    """
    local = settings.address == "local"
    # Ray prints a paragraph about every worker that dies; the supervisor says it in a line.
    ray._private.worker._worker_logs_enabled = False
    before = {child.pid for child in psutil.Process().children()}
    run_dir = RunDir.make()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(
            **_init_arguments(settings, run_dir.path / _RAY_DIR, num_cpus, worker_env or {})
        )
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        run_dir.remove()
        what = "Ray did not start here" if local else f"no Ray cluster answers at {settings.address}"
        raise ConfigError(f"cluster.address: {what}: {_first_line(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init takes it over
    address: Any = context.address_info
    children = psutil.Process().children(recursive=True) if local else []
    return RaySession(
        local=local,
        run_dir=run_dir,
        log_dir=Path(address["session_dir"]) / "logs",
        dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else None,
        node_id=address["node_id"],
        address=address["gcs_address"],
        children=tuple(child for child in children if child.pid not in before),
    )


def join_kept(keeper: KeeperLink) -> RaySession:
    """Connect to the Ray of a keeper that this process holds. Raises `ConfigError` when none answers."""
    kept = keeper.ray
    # It read the environment when it was imported, without the token.
    ray._raylet.Config.initialize("")  # type: ignore[attr-defined]  # Ray has no stubs for it
    ray._private.worker._worker_logs_enabled = False
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(
            address=kept.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ConfigError(
            f"cluster.address: Ray in {kept.run_dir} does not answer: {_first_line(error)}"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    return RaySession(
        local=True,
        run_dir=RunDir.of_keeper(kept.run_dir),
        log_dir=kept.log_dir,
        dashboard_url=kept.dashboard_url,
        node_id=context.address_info["node_id"],
        address=kept.address,
        keeper=keeper,
    )


def close_session(session: RaySession, *, grace_s: float) -> None:
    """Leave the cluster; end every process and remove every file of a local one. Never raises for those."""
    if session.keeper is not None:
        _close_kept(session.keeper)
        return
    started = set(session.children)
    if session.local:
        # Workers came later than the session, as children of its raylet.
        for child in session.children:
            try:
                started.update(child.children(recursive=True))
            except psutil.NoSuchProcess:
                continue
    ray.shutdown()
    _, alive = psutil.wait_procs(started, timeout=grace_s)
    for process in alive:
        log.warning("process %d outlived Ray by %.0f s; killed", process.pid, grace_s)
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=grace_s)
    session.run_dir.remove()


def _close_kept(keeper: KeeperLink) -> None:
    ray.shutdown()
    try:
        keeper.end()
    except TimeoutError:
        log.warning("the keeper of Ray, process %d, does not end; killed", keeper.ray.keeper_pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(keeper.ray.keeper_pid).kill()  # the kernel ends its Ray with it


def _init_arguments(
    settings: ClusterSettings, ray_dir: Path, num_cpus: int, worker_env: Mapping[str, str]
) -> dict[str, Any]:
    common: dict[str, Any] = {
        "address": settings.address,
        "namespace": NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if settings.address != "local":
        return common | {"runtime_env": {"env_vars": dict(worker_env)}}
    return common | {
        "num_cpus": num_cpus,
        "include_dashboard": settings.dashboard,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": settings.dashboard_port,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": str(ray_dir),
    }


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
