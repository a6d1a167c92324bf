"""The transfer backend that a deployment's configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.factory import make_backend
from kvtransfer.protocol import PoolRegion, TransferBackend
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.transfer_settings import TransferSettings
from pdserve.worker.ports import BackendFactory


def configured_backend(settings: TransferSettings) -> BackendFactory:
    """Makes `settings.backend` for each worker that asks."""

    def make(
        worker: WorkerId, epoch: int, regions: Sequence[PoolRegion], fingerprint: Fingerprint
    ) -> TransferBackend:
        return make_backend(
            settings.backend,
            worker,
            epoch,
            regions,
            fingerprint,
            ucx=settings.ucx,
            tcp_fallback=settings.tcp_fallback,
        )

    return make
