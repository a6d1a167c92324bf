"""Workers as actors: what Ray places, names, watches and shows on its dashboard.

A class per role in which a worker starts, so that the dashboard tells them apart; both can take up the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdserve.worker.hosting import HostedWorker, Running
from pdserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pdserve.worker.ports import EnginePort
    from pdserve.worker.ranks.leader import Leader


class ElasticActor(HostedWorker):
    """A worker in a process of its own."""

    def _serve(self, spec: WorkerSpec, engine: EnginePort, leader: Leader | None) -> Running:
        # Here, not at the top: the launcher imports this module, and must not pay for torch.
        from pdserve.elastic.worker import start_worker

        return start_worker(spec, engine=engine, leader=leader)


class PrefillActor(ElasticActor):
    """Starts with reading prompts."""


class DecodeActor(ElasticActor):
    """Starts with writing answers."""
