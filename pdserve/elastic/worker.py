"""A worker: the scheduler's plans, computed by the engine, pushed while they compute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from decode.guessing import make_speculation
from pdserve.core.messages import Role
from pdserve.elastic.scheduler import ElasticScheduler
from pdserve.engine.tiers.store import TierPort
from pdserve.worker.backends import configured_backend
from pdserve.worker.compute import compute
from pdserve.worker.loop import Perform
from pdserve.worker.ports import BackendFactory, EnginePort
from pdserve.worker.ranks.leader import Leader
from pdserve.worker.running import RunningWorker, launch, load_engine, longest_sequence
from pdserve.worker.shared import Shared
from pdserve.worker.spec import WorkerSpec

CPU_GATHER_TOKENS: Final = 128
"""Rows from which on a CPU computes as many a second as it ever does: 128 take 145 ms where 512 take 620."""


class ElasticRole:
    """Computes `ElasticScheduler`'s plans. Used by one thread."""

    def __init__(
        self,
        scheduler: ElasticScheduler,
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

        self.scheduler.draft(plan, self._clock)
        # Only prompts that are read for others are pushed layer by layer.
        results = (
            compute(
                self._engine, plan.works(), layer_groups=self._layer_groups, on_layers_done=on_layers_done
            )
            if plan.chunks
            else compute(self._engine, plan.works())
        )
        perform(self.scheduler.complete(plan, results, self._clock()))
        return True


def start_worker(
    spec: WorkerSpec,
    *,
    engine: EnginePort | None = None,
    draft_engine: EnginePort | None = None,
    backend_factory: BackendFactory | None = None,
    leader: Leader | None = None,
) -> RunningWorker:
    """Start a worker in this process, in the role that its spec says: loads the models unless given engines,
    then listens. leader: of the ranks that `engine` computes with; None: it is alone.

    Raises the engine's and the transfer backend's typed errors, and OSError for a bad address.
    """
    prefill, decode = spec.config.prefill, spec.config.decode

    def make_role(engine: EnginePort, tiers: TierPort | None) -> ElasticRole:
        shared = Shared(
            worker=spec.worker,
            epoch=spec.epoch,
            role=spec.role,
            layout=engine.runner.pools[0].layout,
            num_blocks=engine.num_blocks,
            max_len=longest_sequence(engine),
            prefix_caching=spec.config.cache.enable_prefix_caching,
            tiers=tiers,
            gather_tokens=CPU_GATHER_TOKENS if spec.device == "cpu" else None,
        )
        scheduler = ElasticScheduler(
            shared,
            prefill_tokens=prefill.max_num_batched_tokens,
            prefill_seqs=prefill.max_num_seqs,
            decode_tokens=decode.max_num_batched_tokens,
            decode_seqs=decode.max_num_seqs,
            speculation=make_speculation(spec, engine, draft_engine),
        )
        return ElasticRole(scheduler, engine, layer_groups=spec.config.transfer.layer_groups)

    return launch(
        spec,
        engine or load_engine(spec),
        make_role,
        max_num_seqs=prefill.max_num_seqs if spec.role is Role.PREFILL else decode.max_num_seqs,
        backend_factory=backend_factory or configured_backend(spec.config.transfer),
        leader=leader,
    )
