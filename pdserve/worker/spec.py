"""What a worker process is told to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.core.config import ServeConfig
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import PlannerMode
from pdserve.worker.cores import CoreShare
from pdserve.worker.ranks.names import RankSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker: its place in the deployment and where it listens for coordinators."""

    worker: WorkerId
    role: Role
    epoch: int
    """Of the process; higher after every restart."""
    config: ServeConfig
    model_dir: Path
    listen: str
    """`unix:/path` or `tcp:host:port`; port 0 picks a free one."""
    device: str = "cpu"
    num_threads: int | None = None
    """Compute threads; None leaves the choice to torch."""
    identity: str = ""
    """Of the deployment's settings: who takes this worker over must have the same."""
    draft_model_dir: Path | None = None
    """Of speculative decoding, where its method is a model."""
    profile_s: float = 0.0
    """How long it measures its own speed before it takes requests; 0: not at all."""
    core_share: CoreShare | None = None
    """How it lends and borrows cores; None: it does neither."""
    ranks: RankSpec | None = None
    """Its place among the ranks of a tensor-parallel worker; None: it is the only one."""

    @property
    def model_name(self) -> str:
        """As clients know it."""
        names = self.config.model.served_names
        return names[0] if names else self.model_dir.name

    @property
    def comes_to_decode(self) -> bool:
        """It starts as a decode worker, or the planner may make it one: it then has what one has, from the
        beginning (weights also in their form for few rows, recorded steps, a draft model).

        Elsewhere a prefill worker saves that memory, also where an operator may change its role by hand.
        """
        return self.role is Role.DECODE or self.config.planner.mode is PlannerMode.ACTIVE
