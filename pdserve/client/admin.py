"""What operators ask of a running service: draining a worker, and why a request went as it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import grpc

from pdserve.client.channel import OPEN_ACCESS, Access
from pdserve.client.failures import error_from
from pdserve.core.proto.pdserve.v1 import admin_pb2 as pb

_SERVICE: Final = "/pdserve.v1.Admin/"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainStatus:
    requests_left: int
    drained: bool
    """Nothing of any request is left there."""


def undrain(address: str, worker: str, *, access: Access = OPEN_ACCESS) -> None:
    """Put a drained worker back into use. Raises `InvalidRequest` for one that is not there, ..."""
    with access.channel(address) as channel:
        call = channel.unary_unary(
            f"{_SERVICE}Undrain", pb.UndrainRequest.SerializeToString, pb.UndrainResponse.FromString
        )
        try:
            call(pb.UndrainRequest(worker=worker))
        except grpc.RpcError as error:
            raise error_from(error.code(), error.details() or "", error.trailing_metadata() or ()) from error


def drain(
    address: str, worker: str, *, timeout_s: float | None = None, access: Access = OPEN_ACCESS
) -> Iterator[DrainStatus]:
    """Take a worker out of use; yields how much is left whenever that changes, until nothing is.

    timeout_s: after this long, what could not move to another worker starts over there; None: as configured.
    Raises a `PdServeError`: `InvalidRequest` for a worker that is not there, `WorkerLost`, ...
    """
    with access.channel(address) as channel:
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


def scale(
    address: str,
    *,
    model: str = "",
    prefill: int | None = None,
    decode: int | None = None,
    access: Access = OPEN_ACCESS,
) -> Iterator[pb.ScaleStatus]:
    """Start or retire workers of a model until it has so many; yields how far that is whenever it changes.

    What was begun goes on when the caller leaves. The fields are described in admin.proto. Raises a
    `PdServeError`: `InvalidRequest` for what the planner's limits forbid, ...
    """
    with access.channel(address) as channel:
        call = channel.unary_stream(
            f"{_SERVICE}Scale", pb.ScaleRequest.SerializeToString, pb.ScaleStatus.FromString
        )(pb.ScaleRequest(model=model, prefill=prefill, decode=decode))
        try:
            yield from call
        except grpc.RpcError as error:
            metadata = call.trailing_metadata() or ()
            raise error_from(call.code(), call.details() or "", metadata) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]  # the stubs leave its type out


def plan(address: str, *, timeout_s: float = 10.0, access: Access = OPEN_ACCESS) -> pb.Plans:
    """The newest plan of each model; the fields are described in admin.proto. Raises a `PdServeError`."""
    with access.channel(address) as channel:
        method = channel.unary_unary(f"{_SERVICE}Plan", pb.PlanRequest.SerializeToString, pb.Plans.FromString)
        call = method.future(pb.PlanRequest(), timeout=timeout_s)
        try:
            answer: pb.Plans = call.result()
        except grpc.RpcError as error:
            raise error_from(call.code(), call.details() or "", call.trailing_metadata() or ()) from error
        return answer


def explain(
    address: str, request: str = "", *, timeout_s: float = 10.0, access: Access = OPEN_ACCESS
) -> pb.Explanation:
    """The story of a request: decisions with their candidates and predictions, attempts, phases, outputs.

    request: its id, or empty for the last one that arrived. The fields are described in admin.proto. Raises a
    `PdServeError`: `RequestNotFound` for one that is not remembered, ...
    """
    with access.channel(address) as channel:
        method = channel.unary_unary(
            f"{_SERVICE}Explain", pb.ExplainRequest.SerializeToString, pb.Explanation.FromString
        )
        call = method.future(pb.ExplainRequest(request=request), timeout=timeout_s)
        try:
            story: pb.Explanation = call.result()
        except grpc.RpcError as error:
            raise error_from(call.code(), call.details() or "", call.trailing_metadata() or ()) from error
        return story
