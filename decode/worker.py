"""A decode worker: the scheduler's plans, computed by the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import assert_never

from decode.draft_model import DraftModel
from decode.drafting import Drafter, PromptLookup
from decode.scheduler import DecodeScheduler
from decode.speculation import Speculation
from pdserve.core.config import SpeculativeMethod
from pdserve.engine.tiers.store import TierPort
from pdserve.worker.backends import configured_backend
from pdserve.worker.compute import compute
from pdserve.worker.loop import Perform
from pdserve.worker.ports import BackendFactory, EnginePort
from pdserve.worker.running import RunningWorker, launch, load_draft_engine, load_engine, longest_sequence
from pdserve.worker.spec import WorkerSpec


def make_speculation(
    spec: WorkerSpec, engine: EnginePort, draft_engine: EnginePort | None
) -> Speculation | None:
    """As `speculative` in the configuration says. Loads the draft model unless given its engine."""
    settings = spec.config.speculative
    drafter: Drafter
    match settings.method:
        case SpeculativeMethod.OFF:
            return None
        case SpeculativeMethod.NGRAM:
            drafter = PromptLookup(
                min_tokens=settings.prompt_lookup_min, max_tokens=settings.prompt_lookup_max
            )
        case SpeculativeMethod.DRAFT_MODEL:
            drafter = DraftModel(
                draft_engine or load_draft_engine(spec),
                vocab_size=engine.sampler.vocab_size,
                max_num_batched_tokens=spec.config.decode.max_num_batched_tokens,
            )
        case _:
            assert_never(settings.method)
    return Speculation(
        drafter,
        num_tokens=settings.num_speculative_tokens,
        adaptive=settings.adaptive,
        max_len=longest_sequence(engine),
    )


class DecodeRole:
    """Computes `DecodeScheduler`'s plans. Used by one thread."""

    def __init__(
        self, scheduler: DecodeScheduler, engine: EnginePort, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.scheduler = scheduler
        self._engine, self._clock = engine, clock

    def step(self, perform: Perform) -> bool:
        plan, actions = self.scheduler.schedule(self._clock())
        perform(actions)
        if plan is None:
            return False
        self.scheduler.draft(plan, self._clock)
        results = compute(self._engine, [turn.work() for turn in plan.turns])
        perform(self.scheduler.complete(plan, results, self._clock()))
        return True


def start_decode_worker(
    spec: WorkerSpec,
    *,
    engine: EnginePort | None = None,
    draft_engine: EnginePort | None = None,
    backend_factory: BackendFactory | None = None,
) -> RunningWorker:
    """Start a decode worker in this process: loads the models unless given engines, then listens.

    Raises the engine's and the transfer backend's typed errors, and OSError for a bad address.
    """
    settings = spec.config.decode

    def make_role(engine: EnginePort, tiers: TierPort | None) -> DecodeRole:
        scheduler = DecodeScheduler(
            worker=spec.worker,
            epoch=spec.epoch,
            layout=engine.runner.pools[0].layout,
            num_blocks=engine.num_blocks,
            max_len=longest_sequence(engine),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_caching=spec.config.cache.enable_prefix_caching,
            tiers=tiers,
            speculation=make_speculation(spec, engine, draft_engine),
        )
        return DecodeRole(scheduler, engine)

    return launch(
        spec,
        engine or load_engine(spec),
        make_role,
        max_num_seqs=settings.max_num_seqs,
        backend_factory=backend_factory or configured_backend(spec.config.transfer),
    )
