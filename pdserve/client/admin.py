"""What operators ask of a running service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import grpc

from pdserve.client.channel import OPTIONS, target_of
from pdserve.client.failures import error_from
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb

_SERVICE: Final = "/pdserve.v1.Admin/"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainStatus:
    requests_left: int
    drained: bool
    """Nothing of any request is left there."""


def drain(address: str, worker: str, *, timeout_s: float | None = None) -> Iterator[DrainStatus]:
    """Take a worker out of use; yields how much is left whenever that changes, until nothing is.

    timeout_s: after this long, what could not move to another worker starts over there; None: as configured.
    Raises a `PdServeError`: `InvalidRequest` for a worker that is not there, `WorkerLost`, ...
    """
    with grpc.insecure_channel(target_of(address), options=OPTIONS) as channel:
        call = channel.unary_stream(
            f"{_SERVICE}Drain", pb.DrainRequest.SerializeToString, pb.DrainStatus.FromString
        )(pb.DrainRequest(worker=worker, timeout_s=timeout_s))
        try:
            for status in call:
                yield DrainStatus(requests_left=status.requests_left, drained=status.drained)
        except grpc.RpcError as error:
            metadata = call.trailing_metadata() or ()
            raise error_from(call.code(), call.details() or "", metadata) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]  # the stubs leave its type out
