"""Makes the backend that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvtransfer.fake import FakeBackend, Faults
from kvtransfer.local import LocalBackend, LocalHub
from kvtransfer.nixl import NixlBackend
from kvtransfer.protocol import PoolRegion, TransferBackend
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.layout import Fingerprint
from pdserve.core.transfer_settings import TcpFallback, TransferBackendName


def make_backend(
    name: TransferBackendName,
    worker: WorkerId,
    epoch: int,
    regions: Sequence[PoolRegion],
    fingerprint: Fingerprint,
    *,
    hub: LocalHub | None = None,
    faults: Faults | None = None,
    ucx: Mapping[str, str] | None = None,
    tcp_fallback: TcpFallback = TcpFallback.WARN,
) -> TransferBackend:
    """A backend over `regions`, which must outlive it.

    hub: joins the local and fake backends of this process; required for these two.
    faults: what the fake backend does wrong; nothing by default.
    ucx: UCX settings of the nixl backend without their prefix, such as {"TLS": "tcp"}; UCX_* variables in
        the process environment win over them (docs/transfer.md).
    tcp_fallback: what the nixl backend does when bytes go by TCP where a faster way was to be expected.
    Raises `ConfigError`.
    """
    match name:
        case TransferBackendName.NIXL:
            return NixlBackend(worker, epoch, regions, fingerprint, ucx=ucx or {}, tcp_fallback=tcp_fallback)
        case TransferBackendName.LOCAL:
            return LocalBackend(_required(hub, name), worker, epoch, regions, fingerprint)
        case TransferBackendName.FAKE:
            return FakeBackend(_required(hub, name), worker, epoch, regions, fingerprint, faults or Faults())


def _required(hub: LocalHub | None, name: str) -> LocalHub:
    if hub is None:
        raise ConfigError(f"transfer.backend {name} joins workers of one process: it needs a LocalHub")
    return hub
