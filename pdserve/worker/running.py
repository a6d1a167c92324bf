"""A worker that runs in this process: channel server, transfer service and compute loop, as one thing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import torch
from pdcpu import library as pdcpu

from kvtransfer.protocol import PoolRegion, TransferBackend, TransferEvent
from kvtransfer.service import TransferService
from pdserve.core import messages
from pdserve.core.config import CacheSettings
from pdserve.core.errors import ConfigError, InvariantViolated
from pdserve.core.messages import Heartbeat, WorkerInfo
from pdserve.core.tls import accepting
from pdserve.core.worker_state import ProfileStep
from pdserve.engine.build import build_engine
from pdserve.engine.tiers.build import block_bytes_of, make_tiers
from pdserve.engine.tiers.store import TierPort
from pdserve.models.ops import Workload
from pdserve.models.ranks import Ranks
from pdserve.worker.cores import CoreLender
from pdserve.worker.device_probe import Probe, no_probe, probe_of
from pdserve.worker.events import DrainAsked, UndrainAsked
from pdserve.worker.host import WorkerHost
from pdserve.worker.journal import Journal
from pdserve.worker.loop import ComputeLoop, Inbox, Role
from pdserve.worker.ports import BackendFactory, EnginePort, PoolPort, TransferPort
from pdserve.worker.profile import measure
from pdserve.worker.ranks.leader import Leader, TeamTransfer
from pdserve.worker.ranks.names import rank_id
from pdserve.worker.ranks.transfer import OnEvent, RankTransfer, pack_metadata
from pdserve.worker.spec import WorkerSpec

log = logging.getLogger(__name__)

TRANSFER_STOP_S: Final = 10.0


class Pulse:
    """Heartbeats of a compute loop, with how busy its device is. Called on the channel's thread."""

    def __init__(self, probe: Probe = no_probe) -> None:
        self._probe = probe
        self._loop: ComputeLoop | None = None
        self.last: Heartbeat | None = None

    def of(self, loop: ComputeLoop) -> None:
        """Whose heartbeats they are."""
        self._loop = loop

    def __call__(self) -> Heartbeat:
        assert self._loop is not None
        self.last = dataclasses.replace(self._loop.heartbeat(), device=self._probe())
        return self.last


class RunningWorker:
    """Started by `pdserve.elastic.worker.start_worker`."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        address: str,
        host: WorkerHost,
        loop: ComputeLoop,
        inbox: Inbox,
        transfer: TransferPort,
        device: torch.device,
        pulse: Pulse,
        tiers: TierPort | None = None,
    ) -> None:
        self._pulse = pulse
        self._tiers = tiers
        self._device = device
        self.info, self.address = info, address
        self._host, self._loop, self._inbox, self._transfer = host, loop, inbox, transfer
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._compute, name=f"{info.worker}-compute", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until the worker's loops end; raises what killed them, if they were not stopped."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the loops and close everything; requests that still run are lost. Safe to call twice."""
        self._inbox.stop()
        self._thread.join()

    @property
    def num_coordinators(self) -> int:
        """Connected now."""
        return self._host.num_coordinators

    def drain(self) -> None:
        """Take no new requests; coordinators move those that run. Safe in a signal handler, as are the next
        two: they put an event into the inbox, and return."""
        self._inbox.put(DrainAsked(None))

    def undrain(self) -> None:
        """Take new requests again, whoever asked for the drain, and take back `retire`."""
        self._inbox.put(UndrainAsked())

    def retire(self, timeout_s: float) -> None:
        """Drain, and end like after `stop` when nothing is left here, or after `timeout_s`."""
        self._inbox.put(DrainAsked(time.monotonic() + timeout_s))

    @property
    def last_heartbeat(self) -> Heartbeat | None:
        """As it was sent last, or would have been."""
        return self._pulse.last

    def snapshot(self) -> Heartbeat:
        """State after the latest tick. Raises `InvariantViolated` when blocks are not conserved."""
        return _conserved(self._loop.heartbeat())

    def wait_for(self, condition: Callable[[Heartbeat], bool], timeout_s: float = 10.0) -> Heartbeat:
        """The first state that meets `condition`; TimeoutError when none does in time."""
        return _conserved(self._loop.wait_for(condition, timeout_s))

    def _compute(self) -> None:
        try:
            _prepare_thread(self._device)
            self._loop.run()
        except BaseException as error:  # the process's outermost loop: `wait` raises it
            self._failure = error
            log.critical("worker %s died", self.info.worker, exc_info=error)
        finally:
            # A worker that cannot compute must not look alive: coordinators see their connections end.
            self._host.stop()
            self._transfer.stop()
            if self._tiers is not None:
                self._tiers.stop()
            if not self._transfer.join(TRANSFER_STOP_S):
                log.error("the transfer thread of %s does not end", self.info.worker)
            if self._tiers is not None and not self._tiers.join(TRANSFER_STOP_S):
                log.error("the tier thread of %s does not end", self.info.worker)


def launch(
    spec: WorkerSpec,
    engine: EnginePort,
    make_role: Callable[[EnginePort, TierPort | None], Role],
    *,
    max_num_seqs: int,
    backend_factory: BackendFactory,
    leader: Leader | None = None,
) -> RunningWorker:
    """Put a worker's parts together and start them: transfers first, then the channel, then computing.

    leader: of the other ranks, which compute every step of `engine` too.
    """
    regions = pool_regions(engine)
    inbox = Inbox(time.monotonic)
    tiers = _tiers(spec, engine, inbox)
    own_id = rank_id(spec.worker, 0, engine.fingerprint.tp_size)
    backend = backend_factory(own_id, spec.epoch, regions, engine.fingerprint)
    with contextlib.ExitStack() as undo:
        undo.callback(backend.close)
        role = make_role(engine, tiers)
        metadata = pack_metadata([backend.metadata, *(() if leader is None else leader.metadata())])
        lender = _lender(spec)
        profile = _profile(spec, engine, max_num_seqs)
        info = _info(spec, engine, metadata=metadata, max_num_seqs=max_num_seqs, profile=profile)
        transfer = _transfer(spec, backend, engine, leader, inbox.put)
        undo.pop_all()
        transfer.start()
        undo.callback(transfer.stop)
        if tiers is not None:
            tiers.start()
            undo.callback(tiers.stop)
        device = engine.runner.pools[0].device
        pulse = Pulse(probe_of(device, num_cores=int(info.num_devices)))
        host = _host(spec, info, inbox, pulse)
        loop = ComputeLoop(
            role=role,
            host=host,
            transfer=transfer,
            inbox=inbox,
            lender=lender,
            tiers=tiers,
            linger_s=2 * spec.config.cluster.heartbeat_s,
        )
        pulse.of(loop)
        address = host.start(spec.listen)
        undo.pop_all()
    return RunningWorker(
        info=info,
        address=address,
        host=host,
        loop=loop,
        pulse=pulse,
        inbox=inbox,
        transfer=transfer,
        device=device,
        tiers=tiers,
    )


def _lender(spec: WorkerSpec) -> CoreLender | None:
    if spec.core_share is None:
        return None
    native = pdcpu.computing()
    set_helpers = None if native is None else native.set_helpers
    return CoreLender(spec.core_share, torch.set_num_threads, set_helpers)


def _host(spec: WorkerSpec, info: WorkerInfo, inbox: Inbox, pulse: Pulse) -> WorkerHost:
    cluster = spec.config.cluster
    return WorkerHost(
        info=info,
        on_event=inbox.put,
        heartbeat=pulse,
        heartbeat_s=cluster.heartbeat_s,
        journal=Journal(enabled=spec.config.logging.requests),
        # Without a coordinator that could come back, the process ends with the one that started it.
        alone_s=cluster.linger_s or None,
        on_alone=inbox.stop,
        tls=accepting(spec.config.security.cluster_tls),
    )


def _transfer(
    spec: WorkerSpec,
    backend: TransferBackend,
    engine: EnginePort,
    leader: Leader | None,
    on_event: Callable[[TransferEvent], None],
) -> TransferPort:
    """What moves the KV of all ranks, to and from workers of any number of ranks."""
    settings = spec.config.transfer

    def own_service(on_event: OnEvent) -> TransferPort:
        return TransferService(
            backend,
            on_event,
            max_inflight_bytes=settings.max_inflight_mib << 20,
            verify=settings.verify,
        )

    def own(on_event: OnEvent) -> TransferPort:
        return RankTransfer(own_service, engine.fingerprint, on_event)

    return own(on_event) if leader is None else TeamTransfer(own, leader, on_event)


def _tiers(spec: WorkerSpec, engine: EnginePort, inbox: Inbox) -> TierPort | None:
    """Below the pool of a model's one cache group."""
    pool = engine.runner.pools[0]
    return make_tiers(
        spec.config.cache,
        spec.worker,
        engine.fingerprint,
        lambda: block_bytes_of(pool.tensor, pool.layout, pool.num_blocks),
        inbox.put,
    )


def _prepare_thread(device: torch.device) -> None:
    """Which device is current, and how many threads its matrix products use, belongs to each thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(torch.get_num_threads())


def load_engine(
    spec: WorkerSpec,
    *,
    progress: Callable[[float, str], None] | None = None,
    ranks: Ranks | None = None,
) -> EnginePort:
    """The engine that the spec asks for; progress and ranks as `build_engine` takes them.

    Raises `CheckpointError`, `ConfigError`.
    """
    return build_engine(
        spec.model_dir,
        spec.config.model,
        spec.config.cache,
        device=spec.device,
        num_threads=spec.num_threads,
        workload=Workload.ANY if spec.comes_to_decode else Workload.PREFILL,
        progress=progress,
        ranks=ranks,
    )


def load_draft_engine(spec: WorkerSpec) -> EnginePort:
    """The small model of speculative decoding, with a KV pool of its own. Raises as `load_engine`."""
    settings = spec.config.speculative
    if spec.draft_model_dir is None:
        raise ConfigError(f"worker {spec.worker} was not told where the draft model {settings.model} is")
    cache = spec.config.cache
    return build_engine(
        spec.draft_model_dir,
        spec.config.model.model_copy(update={"max_model_len": None}),
        CacheSettings(block_size=cache.block_size, memory_gib=settings.memory_gib),
        device=spec.device,
        num_threads=None,
    )


def pool_regions(engine: EnginePort) -> list[PoolRegion]:
    """The engine's pools as a transfer backend registers them. One cache group is served today."""
    if len(engine.runner.pools) != 1:
        raise ConfigError(f"models with {len(engine.runner.pools)} cache groups are not served: one is")
    return [
        PoolRegion(
            address=pool.address,
            size_bytes=pool.size_bytes,
            layout=pool.layout,
            num_blocks=pool.num_blocks,
            device=_device_index(pool),
        )
        for pool in engine.runner.pools
    ]


def _device_index(pool: PoolPort) -> int | None:
    return None if pool.device.type == "cpu" else pool.device.index or 0


def longest_sequence(engine: EnginePort) -> int:
    """Tokens of the longest sequence that this worker can hold: the model's context, or its whole pool."""
    return min(engine.runner.max_model_len, engine.num_blocks * engine.block_tokens)


def _profile(spec: WorkerSpec, engine: EnginePort, max_num_seqs: int) -> list[ProfileStep]:
    """Before anybody knows of this worker: nobody holds a block, nobody waits."""
    if not spec.profile_s:
        return []
    role = spec.config.prefill if spec.role is messages.Role.PREFILL else spec.config.decode
    return measure(engine, spec.profile_s, max_tokens=role.max_num_batched_tokens, max_seqs=max_num_seqs)


def _info(
    spec: WorkerSpec,
    engine: EnginePort,
    *,
    metadata: bytes,
    max_num_seqs: int,
    profile: list[ProfileStep],
) -> WorkerInfo:
    return WorkerInfo(
        worker=spec.worker,
        role=spec.role,
        epoch=spec.epoch,
        pid=os.getpid(),
        host=socket.gethostname(),
        fingerprint=engine.fingerprint,
        transfer_metadata=metadata,
        num_blocks=engine.num_blocks,
        block_tokens=engine.block_tokens,
        max_model_len=longest_sequence(engine),
        max_num_seqs=max_num_seqs,
        device=_device_name(engine),
        num_devices=_num_devices(spec, engine),
        profile=profile,
    )


def _device_name(engine: EnginePort) -> str:
    device = engine.runner.pools[0].device
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _num_devices(spec: WorkerSpec, engine: EnginePort) -> float:
    """What is paid for: cores, or GPUs."""
    ranks = engine.fingerprint.tp_size
    if engine.runner.pools[0].device.type == "cpu":
        return ranks * (spec.num_threads or torch.get_num_threads())
    return ranks * (spec.config.cluster.gpus_per_worker or 1.0)


def _conserved(beat: Heartbeat) -> Heartbeat:
    if not beat.blocks.conserved:
        raise InvariantViolated(f"{beat.worker}: blocks are not conserved: {beat.blocks}")
    return beat
