"""Rank 0: it schedules, samples and talks; the others compute and move what it tells them.

    compute thread   Step ------------> follower's compute thread      then all meet in the model's sums
                     pushes ----------> follower's transfer thread
    reader threads   <----- events, beats -- follower                  one per follower

A rank that is lost takes the worker along: none can go on without its heads.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from kvtransfer.protocol import (
    NoteArrived,
    PathInfo,
    PeerConnected,
    PeerFailed,
    Push,
    PushEnded,
    TransferEvent,
    TransferStopped,
)
from pdserve.core.errors import InvariantViolated, ProtocolError, WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.engine.batch import SequenceSlice
from pdserve.worker.ports import EnginePort, OnLayersDone, PoolPort, RunnerPort, SamplerPort, TransferPort
from pdserve.worker.ranks.joining import NoteJoin, PushJoin, slowest
from pdserve.worker.ranks.meeting import await_followers, make_ranks
from pdserve.worker.ranks.names import RankSpec
from pdserve.worker.ranks.wire import (
    Beat,
    ConnectOnRank,
    DisconnectOnRank,
    FromLeader,
    Joining,
    Link,
    RankReady,
    Said,
    Step,
    StopRank,
    SubmitOnRank,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pdserve.models.ranks import Ranks

log = logging.getLogger(__name__)


class Leader:
    """The followers of a worker, seen from rank 0."""

    def __init__(
        self, worker: WorkerId, spec: RankSpec, *, device: str, start_timeout_s: float, silence_s: float
    ) -> None:
        """Wait for all of them. silence_s: after which a follower that serves is dead.

        Raises `WorkerLost` when one does not come within `start_timeout_s`.
        """
        self._worker, self._silence_s = worker, silence_s
        self._start_timeout_s = start_timeout_s
        self._links, store = await_followers(worker, spec, start_timeout_s)
        self._changed = threading.Condition()
        self._metadata: dict[int, bytes] = {}
        self._failure: str | None = None
        self._ending = False
        self._on_event: Callable[[int, TransferEvent], None] | None = None
        for rank, link in self._links.items():
            link.set_timeout(None)  # loading a model may hold a process up
            threading.Thread(target=self._read, args=(rank, link), daemon=True).start()
        self.ranks: Ranks = make_ranks(worker, spec, store, device)

    @property
    def size(self) -> int:
        return len(self._links) + 1

    def metadata(self) -> list[bytes]:
        """Of ranks 1, 2, ... when all of them are ready. Raises `WorkerLost`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or len(self._metadata) == len(self._links),
                self._start_timeout_s,
            )
            self._require()
            if len(self._metadata) < len(self._links):
                raise WorkerLost(self._worker, f"not all ranks were ready in {self._start_timeout_s:g} s")
            return [self._metadata[rank] for rank in sorted(self._metadata)]

    def listen(self, on_event: Callable[[int, TransferEvent], None]) -> None:
        """Hear of the followers' transfers, with their rank; of a lost one as `TransferStopped`."""
        with self._changed:
            self._on_event = on_event
            failure = self._failure
        if failure is not None:
            on_event(0, TransferStopped(error=failure))

    def tell(self, said: FromLeader) -> None:
        """Say something to every follower. Raises `WorkerLost`."""
        self._require()
        for rank, link in self._links.items():
            try:
                link.send(said)
            except OSError as error:
                self.lost(f"rank {rank} takes no messages: {error}")
        self._require()

    def lost(self, why: str) -> None:
        """The ranks are not what they should be: the worker must end."""
        with self._changed:
            if self._failure is not None or self._ending:
                return
            self._failure = why
            self._changed.notify_all()
            on_event = self._on_event
        log.error("%s: %s", self._worker, why)
        if on_event is not None:
            on_event(0, TransferStopped(error=why))

    def stop(self) -> None:
        """Have the followers end. Safe to call twice."""
        with self._changed:
            first, self._ending = not self._ending, True
        for link in self._links.values() if first else ():
            with contextlib.suppress(OSError):  # it has ended
                link.send(StopRank())

    def _require(self) -> None:
        if self._failure is not None:
            raise WorkerLost(self._worker, self._failure)

    def _read(self, rank: int, link: Link) -> None:
        try:
            while (said := link.receive()) is not None:
                self._heard(rank, link, said)
            why = "its process ended"
        except TimeoutError:
            why = f"silent for {self._silence_s:g} s"
        except (OSError, ProtocolError) as error:
            why = str(error)
        self.lost(f"rank {rank} is gone: {why}")
        link.close()

    def _heard(self, rank: int, link: Link, said: Said) -> None:
        match said:
            case RankReady(metadata=metadata):
                link.set_timeout(self._silence_s)
                with self._changed:
                    self._metadata[rank] = metadata
                    self._changed.notify_all()
            case PushEnded() | NoteArrived() | PeerConnected() | PeerFailed() | TransferStopped():
                if self._on_event is not None:
                    self._on_event(rank, said)
            case Beat() | Joining():
                pass
            case _:
                raise ProtocolError(f"a follower said {type(said).__name__}")


class LeadingRunner:
    """`RunnerPort`: the followers compute every step too."""

    def __init__(self, own: RunnerPort, leader: Leader) -> None:
        self._own, self._leader = own, leader

    @property
    def pools(self) -> Sequence[PoolPort]:
        """Rank 0's."""
        return self._own.pools

    @property
    def max_model_len(self) -> int:
        return self._own.max_model_len

    def forward(
        self,
        slices: Sequence[SequenceSlice],
        *,
        layer_groups: int = 1,
        on_layers_done: OnLayersDone | None = None,
    ) -> Tensor:
        self._leader.tell(Step(list(slices), None if on_layers_done is None else layer_groups))
        with _Together(self._leader):
            return self._own.forward(slices, layer_groups=layer_groups, on_layers_done=on_layers_done)


class _Together:
    """Whatever ends a step early, the ranks have parted: nobody may compute on."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, InvariantViolated):
            self._leader.lost(f"a step failed on rank 0: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadingEngine:
    """`EnginePort` of a worker of several ranks, on rank 0."""

    runner: LeadingRunner
    sampler: SamplerPort
    fingerprint: Fingerprint
    num_blocks: int
    block_tokens: int


def leading(engine: EnginePort, leader: Leader) -> LeadingEngine:
    """The engine that all ranks are together; engine: rank 0's part."""
    return LeadingEngine(
        runner=LeadingRunner(engine.runner, leader),
        sampler=engine.sampler,
        fingerprint=engine.fingerprint,
        num_blocks=engine.num_blocks,
        block_tokens=engine.block_tokens,
    )


class TeamTransfer:
    """`TransferPort` of all ranks: what happened on each of them happened."""

    def __init__(
        self,
        make_own: Callable[[Callable[[TransferEvent], None]], TransferPort],
        leader: Leader,
        on_event: Callable[[TransferEvent], None],
    ) -> None:
        self._leader, self._on_event = leader, on_event
        self._lock = threading.Lock()
        self._joins: dict[int, PushJoin] = {}
        self._notes = NoteJoin()
        self._answers: dict[WorkerId, dict[int, tuple[int, PathInfo]]] = {}
        """Epoch and path that each rank has met a peer by."""
        self._own = make_own(lambda event: self._handle(0, event))

    def start(self) -> None:
        self._own.start()
        self._leader.listen(self._handle)

    def submit(self, push: Push) -> None:
        with self._lock:
            self._joins[push.id] = PushJoin(push.id, self._leader.size)
        self._leader.tell(SubmitOnRank(push))
        self._own.submit(push)

    def connect(self, peer: WorkerId, epoch: int, fingerprint: Fingerprint, metadata: bytes) -> None:
        with self._lock:
            self._answers[peer] = {}
        self._leader.tell(ConnectOnRank(peer, epoch, fingerprint, metadata))
        self._own.connect(peer, epoch, fingerprint, metadata)

    def disconnect(self, peer: WorkerId, epoch: int | None = None) -> None:
        self._leader.tell(DisconnectOnRank(peer, epoch))
        self._own.disconnect(peer, epoch)

    def stop(self) -> None:
        self._leader.stop()
        self._own.stop()

    def join(self, timeout_s: float | None = None) -> bool:
        return self._own.join(timeout_s)

    def _handle(self, rank: int, event: TransferEvent) -> None:
        if isinstance(event, TransferStopped) and rank:
            self._leader.lost(f"rank {rank} moves nothing any more: {event.error}")
            return
        with self._lock:
            whole = self._joined(rank, event)
        if whole is not None:
            self._on_event(whole)

    def _joined(self, rank: int, event: TransferEvent) -> TransferEvent | None:
        match event:
            case PushEnded(id=push):
                joined = self._joins.get(push)
                if joined is None:
                    return None
                whole = joined.add(event)
                if whole is not None and whole.terminal:
                    del self._joins[push]
                return whole
            case NoteArrived():
                return self._notes.add(rank, self._leader.size, event)
            case PeerConnected(peer=peer, epoch=epoch, path=path):
                answers = self._answers.setdefault(peer, {})
                answers[rank] = (epoch, path)
                same = [way for met, way in answers.values() if met == epoch]
                whole_path = slowest(same) if len(same) == self._leader.size else None
                return None if whole_path is None else PeerConnected(peer=peer, epoch=epoch, path=whole_path)
            case _:
                return event
