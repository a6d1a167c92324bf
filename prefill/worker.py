"""A prefill worker: the scheduler's plans, computed by the engine, pushed while they compute."""

from __future__ import annotations

import time
from collections.abc import Callable

from pdserve.engine.tiers.store import TierPort
from pdserve.worker.backends import configured_backend
from pdserve.worker.compute import compute
from pdserve.worker.loop import Perform
from pdserve.worker.ports import BackendFactory, EnginePort
from pdserve.worker.running import RunningWorker, launch, load_engine, longest_sequence
from pdserve.worker.spec import WorkerSpec
from prefill.scheduler import PrefillScheduler


class PrefillRole:
    """Computes `PrefillScheduler`'s plans. Used by one thread."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        engine: EnginePort,
        *,
        layer_groups: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self._engine, self._layer_groups, self._clock = engine, layer_groups, clock

    def step(self, perform: Perform) -> bool:
        plan, actions = self.scheduler.schedule(self._clock())
        perform(actions)
        if plan is None:
            return False

        def on_layers_done(first: int, last: int) -> None:
            perform(self.scheduler.layers_done(plan, first, last, self._clock()))

        works = [chunk.work() for chunk in plan.chunks]
        results = compute(self._engine, works, layer_groups=self._layer_groups, on_layers_done=on_layers_done)
        perform(self.scheduler.complete(plan, results, self._clock()))
        return True


def start_prefill_worker(
    spec: WorkerSpec, *, engine: EnginePort | None = None, backend_factory: BackendFactory | None = None
) -> RunningWorker:
    """Start a prefill worker in this process: loads the model unless given an engine, then listens.

    Raises the engine's and the transfer backend's typed errors, and OSError for a bad address.
    """
    settings = spec.config.prefill

    def make_role(engine: EnginePort, tiers: TierPort | None) -> PrefillRole:
        scheduler = PrefillScheduler(
            worker=spec.worker,
            epoch=spec.epoch,
            layout=engine.runner.pools[0].layout,
            num_blocks=engine.num_blocks,
            max_len=longest_sequence(engine),
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            prefix_caching=spec.config.cache.enable_prefix_caching,
            tiers=tiers,
        )
        return PrefillRole(scheduler, engine, layer_groups=spec.config.transfer.layer_groups)

    return launch(
        spec,
        engine or load_engine(spec),
        make_role,
        max_num_seqs=settings.max_num_seqs,
        backend_factory=backend_factory or configured_backend(spec.config.transfer),
    )
