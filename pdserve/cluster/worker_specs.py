"""What each worker is told to be: its model, where it listens, its cores, and where its ranks meet."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.placement import PlacementPlan, WorkerSlot, slot_ranks
from pdserve.cluster.ray_session import NAMESPACE, RaySession
from pdserve.core.config import CacheSettings, ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.worker.cores import CoreShare
from pdserve.worker.ranks.names import RankSpec
from pdserve.worker.spec import WorkerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedModel:
    """One of the models that workers are started for."""

    config: ServeConfig
    """As if it were the only one."""
    model_dir: Path
    draft_model_dir: Path | None = None
    """Of speculative decoding, where a model guesses."""


class WorkerSpecs:
    """Of one deployment's workers, as they are placed."""

    def __init__(
        self,
        session: RaySession,
        plan: PlacementPlan,
        config: ServeConfig,
        models: Sequence[HostedModel],
        identity: str,
        node_of: Mapping[WorkerId, str],
        pinned: Mapping[WorkerId, tuple[int, ...]],
    ) -> None:
        """node_of, pinned: where each worker is, and the cores of each rank; the host changes them."""
        self._session, self._plan, self._config = session, plan, config
        self._models, self._identity = models, identity
        self._node_of, self._pinned = node_of, pinned

    def of(self, slot: WorkerSlot, epoch: int) -> WorkerSpec:
        model = self._models[slot.model]
        return WorkerSpec(
            worker=slot.worker,
            role=slot.role,
            epoch=epoch,
            config=worker_config(model.config, self._plan),
            model_dir=model.model_dir,
            draft_model_dir=model.draft_model_dir,
            identity=self._identity,
            listen=self._listen(slot, epoch),
            device="cuda:0" if self._plan.uses_gpus else "cpu",
            num_threads=None if self._plan.uses_gpus else max(1, len(self._pinned[slot_ranks(slot)[0]])),
            core_share=self._core_share(slot),
            profile_s=model.config.cluster.profile_s,
            ranks=None if slot.ranks == 1 else self._meeting(slot, epoch),
        )

    def _meeting(self, slot: WorkerSlot, epoch: int) -> RankSpec:
        """Where the ranks of a worker meet; as its first one sees it."""
        here = self._node_of[slot.worker] == self._session.node_id
        root = self._session.run_dir.path if here else Path(tempfile.gettempdir())
        name = f"{slot.worker}.{epoch}" if here else f"{NAMESPACE}-{slot.worker}.{secrets.token_hex(8)}"
        return RankSpec(rank=0, size=slot.ranks, meeting=root / f"{name}.ranks")

    def _core_share(self, slot: WorkerSlot) -> CoreShare | None:
        """None on GPUs, beside workers of several ranks, where workers are on other machines than the board,
        and for workers that were added."""
        if self._plan.uses_gpus or not self._config.cluster.lend_cores or not self._all_here():
            return None
        if any(other.ranks > 1 for other in self._plan.slots):  # ranks wait for one another: none may lag
            return None
        planned = [(index, other.worker) for index, other in enumerate(self._plan.slots)]
        indexed = [(index, worker) for index, worker in planned if worker in self._pinned]
        if slot.worker not in dict(indexed).values():  # it was added: the others know nothing of its cores
            return None
        lenders = lenders_of(slot, [other for other in self._plan.slots if other.worker in self._pinned])
        return CoreShare(
            board=self._session.run_dir.path / "cores",
            index=next(index for index, worker in indexed if worker == slot.worker),
            cores=self._pinned[slot.worker],
            others=tuple((index, self._pinned[worker]) for index, worker in indexed if worker in lenders),
            borrows=slot.role is Role.PREFILL,
        )

    def _all_here(self) -> bool:
        return set(self._node_of.values()) == {self._session.node_id}

    def _listen(self, slot: WorkerSlot, epoch: int) -> str:
        """A unix socket while every worker is on our own machine, else TCP on the worker's address."""
        if self._all_here():
            return f"unix:{self._session.run_dir.path}/{slot.worker}.{epoch}.sock"
        hosts = {node.id: node.host for node in self._session.nodes()}
        return f"tcp:{hosts[self._node_of[slot.worker]]}:0"


def worker_config(config: ServeConfig, plan: PlacementPlan) -> ServeConfig:
    """The config a worker gets: GPU memory is divided among the workers that share a GPU."""
    if plan.workers_per_gpu == 1:
        return config
    share = config.cache.gpu_memory_utilization / plan.workers_per_gpu
    cache: CacheSettings = config.cache.model_copy(update={"gpu_memory_utilization": share})
    return config.model_copy(update={"cache": cache})


def lenders_of(borrower: WorkerSlot, slots: Sequence[WorkerSlot]) -> frozenset[WorkerId]:
    """Whose cores a worker may compute on: a prefill worker, everybody's; a decode worker, those of its part
    of the prefill workers.

    A helper that shares its core with another one is slow, and holds up whoever it helps. Prompts come now
    and then, but decode workers compute nearly always: so no core is lent to two of them.
    """
    if borrower.role is Role.PREFILL:
        return frozenset(slot.worker for slot in slots) - {borrower.worker}
    readers = [slot.worker for slot in slots if slot.role is Role.PREFILL]
    writers = [slot.worker for slot in slots if slot.role is Role.DECODE]
    return frozenset(readers[writers.index(borrower.worker) :: len(writers)])
