"""Ranks 1, 2, ...: they compute their part of each step, and move their heads of each block, as rank 0 says.

reader thread      what the leader says: steps to the queue, pushes to the transfer service
compute thread     one step after the other, in `run`
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvtransfer.protocol import PoolRegion, TransferEvent
from kvtransfer.service import TransferService
from pdserve.core.errors import ProtocolError, WorkerLost
from pdserve.worker.ports import BackendFactory, EnginePort, TransferPort
from pdserve.worker.ranks.meeting import join_leader, make_ranks
from pdserve.worker.ranks.names import RankSpec, rank_id
from pdserve.worker.ranks.transfer import OnEvent, RankTransfer
from pdserve.worker.ranks.wire import (
    Beat,
    ConnectOnRank,
    DisconnectOnRank,
    FromFollower,
    RankReady,
    Said,
    Step,
    StopRank,
    SubmitOnRank,
)
from pdserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pdserve.models.ranks import Ranks

log = logging.getLogger(__name__)

TRANSFER_STOP_S: Final = 10.0


class Follower:
    """One rank, from meeting the leader to the end of the worker."""

    def __init__(self, spec: WorkerSpec, rank: RankSpec) -> None:
        """Meet the leader and the other ranks. Raises `WorkerLost`, `ConfigError`."""
        self._spec, self._rank = spec, rank
        timeout_s = spec.config.cluster.start_timeout_s
        self._link, store = join_leader(spec.worker, rank, os.getpid(), timeout_s)
        self._steps: queue.SimpleQueue[Step | StopRank | str] = queue.SimpleQueue()
        """A word: why the leader is gone."""
        self._transfer: TransferPort | None = None
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank.rank}-link", daemon=True)
        self._reader.start()
        self.ranks: Ranks = make_ranks(spec.worker, rank, store, spec.device)

    def run(
        self,
        engine: EnginePort,
        make_backend: BackendFactory,
        regions_of: Callable[[EnginePort], list[PoolRegion]],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve until the leader says stop. Raises `WorkerLost` when it is gone, or what broke a step."""
        name = rank_id(self._spec.worker, self._rank.rank, self._rank.size)
        backend = make_backend(name, self._spec.epoch, regions_of(engine), engine.fingerprint)
        settings = self._spec.config.transfer

        def service(on_event: OnEvent) -> TransferPort:
            return TransferService(
                backend, on_event, max_inflight_bytes=settings.max_inflight_mib << 20, verify=settings.verify
            )

        self._transfer = RankTransfer(service, engine.fingerprint, self._tell)
        self._transfer.start()
        try:
            self._say(RankReady(backend.metadata))
            on_ready()
            self._compute(engine)
        finally:
            self._transfer.stop()
            self._transfer.join(TRANSFER_STOP_S)
            self.close()

    def close(self) -> None:
        """The leader sees this rank end. Safe to call twice, from any thread."""
        self._link.close()

    def _compute(self, engine: EnginePort) -> None:
        while True:
            match self._steps.get():
                case Step(slices=slices, layer_groups=None):
                    engine.runner.forward(slices)
                case Step(slices=slices, layer_groups=int(groups)):
                    engine.runner.forward(slices, layer_groups=groups, on_layers_done=lambda *_: None)
                case StopRank():
                    return
                case why:
                    raise WorkerLost(self._spec.worker, f"rank 0 is gone: {why}")

    def _tell(self, event: TransferEvent) -> None:
        try:
            self._link.send(event)
        except OSError as error:
            log.warning("rank %d cannot tell the leader: %s", self._rank.rank, error)

    def _say(self, said: FromFollower) -> None:
        try:
            self._link.send(said)
        except OSError as error:
            raise WorkerLost(self._spec.worker, f"rank 0 is gone: {error}") from error

    def _read(self) -> None:
        try:
            self._steps.put(self._converse())
        except (OSError, ProtocolError, WorkerLost, ValueError) as error:  # ValueError: the link was closed
            self._steps.put(str(error) or type(error).__name__)

    def _converse(self) -> StopRank | str:
        """Until the end; a beat whenever one is due."""
        beat_s = self._spec.config.cluster.heartbeat_s
        due = time.monotonic() + beat_s
        while True:
            readable, _, _ = select.select([self._link.fileno()], [], [], max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                self._say(Beat())
                due = time.monotonic() + beat_s
            if not readable:
                continue
            said = self._link.receive()
            if said is None:
                return "its process ended"
            if isinstance(said, StopRank):
                return said
            self._heard(said)

    def _heard(self, said: Said) -> None:
        transfer = self._transfer
        match said:
            case Step():
                self._steps.put(said)
            case SubmitOnRank() | ConnectOnRank() | DisconnectOnRank() if transfer is None:
                raise ProtocolError("a transfer was asked for before this rank was ready")
            case SubmitOnRank(push):
                assert transfer is not None
                transfer.submit(push)
            case ConnectOnRank(peer, epoch, fingerprint, metadata):
                assert transfer is not None
                transfer.connect(peer, epoch, fingerprint, metadata)
            case DisconnectOnRank(peer, epoch):
                assert transfer is not None
                transfer.disconnect(peer, epoch)
            case _:
                raise ProtocolError(f"the leader said {type(said).__name__}")
