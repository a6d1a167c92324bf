"""Ranks 1, 2, ... of a worker as actors. Rank 0 is `pdserve.worker.hosting.HostedWorker`."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from pdserve.core.errors import ConfigError, PdServeError
from pdserve.core.logs import log_worker
from pdserve.worker.hosting import NotStarted, Progress, Started, StartStep, on_sigterm, pin_process
from pdserve.worker.ranks.names import RankSpec
from pdserve.worker.spec import WorkerSpec

log = logging.getLogger(__name__)

_LAST_WORD_S: Final = 1.0
"""Whoever waits hears why it ends before the process does."""


class RankActor:
    """One follower in a process of its own, which ends with it."""

    def __init__(self, spec: WorkerSpec, core_slots: Sequence[int] = ()) -> None:
        if spec.ranks is None:
            raise ConfigError(f"{spec.worker} has one rank: it has no followers")
        self._spec, self._rank, self._core_slots = spec, spec.ranks, tuple(core_slots)
        self._changed = threading.Condition()
        self._end: str | BaseException | None = None
        on_sigterm(lambda: None)  # rank 0 drains the worker, and then ends all of it

    def __repr__(self) -> str:
        """For Ray's dashboard and logs."""
        return f"{type(self).__name__}({self._spec.worker} rank {self._rank.rank}, {self._spec.model_name})"

    def start(self) -> Iterator[StartStep]:
        """Meet the other ranks and load this one's part of the model; yields as `HostedWorker.start`."""
        log_worker(self._spec.config.logging, self._spec.worker)
        cores = pin_process(self._core_slots)
        steps: queue.SimpleQueue[StartStep | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._live, args=(steps, cores), name="rank", daemon=True).start()
        while True:
            step = steps.get()
            match step:
                case PdServeError():
                    yield NotStarted(error=type(step).__name__, message=str(step))
                    return
                case BaseException():
                    raise step
                case Started():
                    yield step
                    return
                case _:
                    yield step

    def wait(self) -> str:
        """Block until the rank has ended; raises what broke it."""
        with self._changed:
            self._changed.wait_for(lambda: self._end is not None)
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end or ""

    def ping(self) -> int:
        """The process id: proof that the process answers."""
        return os.getpid()

    def _live(self, steps: queue.SimpleQueue[StartStep | BaseException], cores: tuple[int, ...]) -> None:
        end: str | BaseException = "its worker was stopped"
        try:
            self._serve(self._rank, steps, cores)
        except BaseException as error:  # the process's outermost frame: `start` or `wait` raises it
            log.error("rank %d of %s ends: %s", self._rank.rank, self._spec.worker, error)
            steps.put(error)
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()
        threading.Event().wait(_LAST_WORD_S)
        # The launcher ends it, but may be gone; and a broken rank may hang in a library.
        os.kill(os.getpid(), signal.SIGKILL)

    def _serve(
        self, rank: RankSpec, steps: queue.SimpleQueue[StartStep | BaseException], cores: tuple[int, ...]
    ) -> None:
        # Here, not at the top: the launcher imports this module, and must not pay for torch.
        from pdserve.worker.backends import configured_backend
        from pdserve.worker.ranks.follower import Follower
        from pdserve.worker.running import load_engine, pool_regions

        spec = self._spec
        follower = Follower(spec, rank)
        try:
            engine = load_engine(
                spec,
                progress=lambda done, text: steps.put(Progress(fraction=0.99 * done, text=text)),
                ranks=follower.ranks,
            )
            follower.run(
                engine,
                configured_backend(spec.config.transfer),
                pool_regions,
                on_ready=lambda: steps.put(Started(address="", pid=os.getpid(), pinned_cores=cores)),
            )
        finally:
            follower.close()
