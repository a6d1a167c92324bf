"""Whether a service takes requests, by gRPC's own health protocol."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.client.channel import OPEN_ACCESS, Access
from pdserve.client.failures import error_from


def is_serving(
    address: str, *, model: str = "", timeout_s: float = 5.0, access: Access = OPEN_ACCESS
) -> bool:
    """Of one model, or of all that are served. No key is needed for it.

    Raises `WorkerLost` when nobody answers at `address`, `ModelNotFound` or another `PdServeError`.
    """
    with access.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=model), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_from(error.code(), error.details() or "", error.trailing_metadata() or ()) from error
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
