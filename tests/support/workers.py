"""Workers in this process, joined by a local hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtransfer.local import LocalBackend, LocalHub
from kvtransfer.protocol import PoolRegion, TransferBackend
from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.messages import Role
from pdserve.elastic.worker import start_worker
from pdserve.worker.ports import BackendFactory, EnginePort
from pdserve.worker.running import RunningWorker
from pdserve.worker.spec import WorkerSpec

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")


def local_backends(hub: LocalHub) -> BackendFactory:
    def make(
        worker: WorkerId, epoch: int, regions: Sequence[PoolRegion], fingerprint: Fingerprint
    ) -> TransferBackend:
        return LocalBackend(hub, worker, epoch, regions, fingerprint)

    return make


def config_of(**sections: dict[str, Any]) -> ServeConfig:
    defaults: dict[str, dict[str, Any]] = {
        "prefill": {"max_num_batched_tokens": 16},
        "decode": {"max_num_batched_tokens": 16},
        "transfer": {"layer_groups": 2},
        "cluster": {"heartbeat_s": 0.05},
    }
    return ServeConfig.model_validate(
        {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """One prefill and one decode worker."""

    prefill: RunningWorker
    decode: RunningWorker

    @property
    def addresses(self) -> list[str]:
        return [self.prefill.address, self.decode.address]

    def wait_until_every_block_is_back(self) -> None:
        """Neither worker holds a block for any request, and none is in quarantine."""
        for worker in (self.prefill, self.decode):
            worker.wait_for(lambda beat: beat.blocks.held == beat.blocks.quarantined == 0, 10.0)
            assert worker.snapshot().blocks.conserved


def spec_of(role: Role, folder: Path, config: ServeConfig, *, epoch: int = 1) -> WorkerSpec:
    worker = PREFILL if role is Role.PREFILL else DECODE
    return WorkerSpec(
        worker=worker,
        role=role,
        epoch=epoch,
        config=config,
        model_dir=folder,
        listen=f"unix:{folder}/{worker}.sock",
    )


@contextmanager
def pair_of_workers(
    folder: Path,
    make_engine: Callable[[Role], EnginePort],
    config: ServeConfig | None = None,
    backends: BackendFactory | None = None,
    draft_engine: EnginePort | None = None,
    prefill_draft_engine: EnginePort | None = None,
) -> Iterator[Pair]:
    config = config or config_of()
    backends = backends or local_backends(LocalHub())
    prefill = start_worker(
        spec_of(Role.PREFILL, folder, config),
        engine=make_engine(Role.PREFILL),
        draft_engine=prefill_draft_engine,
        backend_factory=backends,
    )
    try:
        decode = start_worker(
            spec_of(Role.DECODE, folder, config),
            engine=make_engine(Role.DECODE),
            draft_engine=draft_engine,
            backend_factory=backends,
        )
        try:
            yield Pair(prefill, decode)
        finally:
            decode.stop()
        decode.wait()
    finally:
        prefill.stop()
    prefill.wait()
