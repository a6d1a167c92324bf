"""A worker inside its process: pins cores, loads the model while telling how far it is, then runs.

`pdserve.elastic.actor` is this with one function filled in. Nothing here knows Ray: the launcher
makes actors of these classes, and tests call them directly.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from pdserve.core.errors import PdServeError, WorkerLost
from pdserve.core.logs import log_worker
from pdserve.core.messages import Heartbeat, WorkerInfo
from pdserve.worker.ray_metrics import Exporter, export_to_ray
from pdserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pdserve.worker.ports import EnginePort
    from pdserve.worker.ranks.leader import Leader


log = logging.getLogger(__name__)

_LAST_WORD_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a worker is on its way to serving."""

    fraction: float
    """In [0, 1]."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The worker listens at `address`."""

    address: str
    pid: int
    pinned_cores: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotStarted:
    """A typed error ended the start. Sent as data: exceptions with arguments do not survive every pickle."""

    error: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A worker that serves, as the next launcher finds it."""

    identity: str
    epoch: int
    address: str
    pid: int
    num_coordinators: int
    """Not 0: it is in use."""


StartStep = Progress | Started | NotStarted


class Running(Protocol):
    """What `pdserve.elastic.worker.start_worker` returns."""

    @property
    def address(self) -> str: ...
    @property
    def info(self) -> WorkerInfo: ...
    @property
    def num_coordinators(self) -> int: ...
    @property
    def last_heartbeat(self) -> Heartbeat | None: ...
    def wait(self) -> None: ...
    def stop(self) -> None: ...
    def drain(self) -> None: ...
    def undrain(self) -> None: ...
    def retire(self, timeout_s: float) -> None: ...
    def snapshot(self) -> Heartbeat: ...


class HostedWorker(ABC):
    """One worker process. `start` once; `wait` blocks for its whole life; the others answer at once."""

    def __init__(
        self,
        spec: WorkerSpec,
        core_slots: Sequence[int] = (),
        on_abandoned: Callable[[], None] | None = None,
    ) -> None:
        """on_abandoned: called before the process ends because no coordinator came back in time.

        None: the process is not the worker's own. Otherwise SIGTERM drains it, and it ends with its worker.
        """
        self._spec, self._core_slots, self._on_abandoned = spec, tuple(core_slots), on_abandoned
        if on_abandoned is not None:
            on_sigterm(self._told_to_end)
        self._running: Running | None = None
        self._changed = threading.Condition()
        self._num_waiters = 0
        self._stopping = self._retiring = False
        self._end: str | BaseException | None = None
        self._exporter: Exporter | None = None

    def __repr__(self) -> str:
        """For Ray's dashboard, which asks once, and for its logs: name, model, and what it does."""
        spec = self._spec
        state = "" if self._exporter is None else f", {self._exporter.status}"
        return f"{type(self).__name__}({spec.worker}, {spec.model_name}, {spec.device}{state})"

    @abstractmethod
    def _serve(self, spec: WorkerSpec, engine: EnginePort, leader: Leader | None) -> Running:
        """Start this kind of worker around a loaded engine. leader: of the ranks that compute with it."""

    def start(self) -> Iterator[StartStep]:
        """Load the model and begin to listen; yields `Progress`, then `Started` or `NotStarted`."""
        log_worker(self._spec.config.logging, self._spec.worker)
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
        cores = pin_process(self._core_slots)
        if self._spec.core_share is not None:
            share = self._spec.core_share.among(allowed) if cores else None
            self._spec = replace(self._spec, core_share=share)
        steps: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        failure: list[BaseException] = []

        def load() -> None:
            try:
                self._running = self._load(steps)
            except BaseException as error:  # the caller's thread raises it
                failure.append(error)
            finally:
                steps.put(None)

        # The engine belongs to no thread: loading beside this one lets progress be reported meanwhile.
        loader = threading.Thread(target=load, name="load-model")
        loader.start()
        while (step := steps.get()) is not None:
            yield step
        loader.join()
        match failure:
            case [PdServeError() as error]:
                yield NotStarted(error=type(error).__name__, message=str(error))
            case [error]:
                raise error
            case _:
                threading.Thread(target=self._watch, name="watch-worker", daemon=True).start()
                self._exporter = export_to_ray(self._spec, self._last_heartbeat)
                yield Started(address=self._require().address, pid=os.getpid(), pinned_cores=cores)

    def info(self) -> WorkerInfo:
        return self._require().info

    def describe(self) -> Described:
        """What a launcher must know to take this worker over. Raises `WorkerLost` before it serves."""
        running = self._require()
        return Described(
            identity=self._spec.identity,
            epoch=self._spec.epoch,
            address=running.address,
            pid=os.getpid(),
            num_coordinators=running.num_coordinators,
        )

    def wait(self) -> str:
        """Block until the worker was stopped or has retired; raises what killed its loops.

        A later call ends this one: another launcher watches then.
        """
        with self._changed:
            self._num_waiters += 1
            me = self._num_waiters
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._end is not None or self._num_waiters != me)
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end or "another launcher watches it"

    def stop(self) -> None:
        """End the worker's loops; `wait` returns then."""
        self._stopping = True
        if self._running is not None:
            self._running.stop()

    def drain(self) -> None:
        """Take no new requests; coordinators move those that run."""
        self._require().drain()

    def undrain(self) -> None:
        """Take new requests again, and take back `retire`."""
        self._require().undrain()

    def retire(self, timeout_s: float | None = None) -> None:
        """Drain, and end when nothing is left or the time is up: for SIGTERM and for machines that are taken
        away. None: `coordinator.drain_timeout_s`. Safe in a signal handler."""
        self._retiring = True
        limit = self._spec.config.coordinator.drain_timeout_s if timeout_s is None else timeout_s
        if self._running is not None:
            self._running.retire(limit)

    def snapshot(self) -> Heartbeat:
        return self._require().snapshot()

    def ping(self) -> int:
        """The process id: proof that the process answers."""
        return os.getpid()

    def _last_heartbeat(self) -> Heartbeat | None:
        return self._require().last_heartbeat

    def _told_to_end(self) -> None:
        if self._running is None:
            os.kill(os.getpid(), signal.SIGKILL)  # it has nothing yet that could be lost
        self.retire()

    def _watch(self) -> None:
        end: str | BaseException = "stopped"
        try:
            self._require().wait()
        except BaseException as error:  # whoever waits raises it
            end = error
        if self._exporter is not None:
            self._exporter.stop()
        with self._changed:
            self._end = "it was told to end, and has" if end == "stopped" and self._retiring else end
            self._changed.notify_all()
        if self._on_abandoned is None or self._stopping or end != "stopped":
            return  # whoever waits ends the process
        if self._retiring:
            # Whoever waits hears of it first; the process ends too when nobody does.
            threading.Event().wait(_LAST_WORD_S)
        else:
            # The process that started this one is gone, and nobody else would end it.
            self._on_abandoned()
        os.kill(os.getpid(), signal.SIGKILL)

    def _load(self, steps: queue.SimpleQueue[Progress | None]) -> Running:
        # Here, not at the top: the launcher imports this module, and must not pay for torch.
        from pdserve.worker.ranks.leader import Leader, leading
        from pdserve.worker.running import load_engine

        spec = self._spec
        leader = None
        if spec.ranks is not None:
            steps.put(Progress(fraction=0.0, text=f"waiting for {spec.ranks.size - 1} other ranks"))
            leader = Leader(
                spec.worker,
                spec.ranks,
                device=spec.device,
                start_timeout_s=spec.config.cluster.start_timeout_s,
                silence_s=spec.config.coordinator.heartbeat_timeout_s,
            )
        engine = load_engine(
            spec,
            progress=lambda done, text: steps.put(Progress(fraction=0.99 * done, text=text)),
            ranks=None if leader is None else leader.ranks,
        )
        steps.put(Progress(fraction=0.99, text="registering memory for transfers"))
        return self._serve(spec, engine if leader is None else leading(engine, leader), leader)

    def _require(self) -> Running:
        if self._running is None:
            raise WorkerLost(str(self._spec.worker), "it has not started")
        return self._running


def on_sigterm(act: Callable[[], None]) -> None:
    """Call `act`, on a thread of its own, at every SIGTERM, which ends nothing by itself any more.

    Not in the handler: Python runs that between two bytecodes of the main thread, which in an actor may be
    inside Ray's C++ loop for as long as it lives. The byte that the kernel's handler writes comes at once.
    """
    if threading.current_thread() is not threading.main_thread():
        log.warning("not on the main thread: SIGTERM will end this process without a drain")
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        with ours, theirs:  # for the life of the process
            while number := ours.recv(1):
                if number[0] == signal.SIGTERM:
                    act()

    threading.Thread(target=wait, name="wait-for-sigterm", daemon=True).start()


def pin_process(core_slots: Sequence[int]) -> tuple[int, ...]:
    """Bind every thread of this process to some of its cores; returns them. () changes nothing.

    `core_slots` are indices into the cores the process may use, wrapped around where there are fewer.
    Affinity belongs to threads on Linux: new ones inherit it from their creator, so all present ones are set.
    """
    if not core_slots or not hasattr(os, "sched_setaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    cores = {allowed[slot % len(allowed)] for slot in core_slots}
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:  # the thread ended meanwhile
            continue
    return tuple(sorted(cores))
