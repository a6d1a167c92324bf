"""The prefill worker as an actor: what Ray places, names, watches and shows on its dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdserve.worker.hosting import HostedWorker, Running
from pdserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pdserve.engine.build import Engine


class PrefillActor(HostedWorker):
    """A prefill worker in a process of its own."""

    def _serve(self, spec: WorkerSpec, engine: Engine) -> Running:
        # Here, not at the top: the launcher imports this module, and must not pay for torch.
        from prefill.worker import start_prefill_worker

        return start_prefill_worker(spec, engine=engine)
