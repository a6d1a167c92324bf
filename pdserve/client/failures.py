"""The server's errors, as the typed errors they were there. The metadata is described in generation.proto."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc

from pdserve.core import errors
from pdserve.core.errors import PdServeError

_BY_STATUS: Final[dict[grpc.StatusCode, type[PdServeError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.WorkerLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.FAILED_PRECONDITION: errors.ConfigError,
    grpc.StatusCode.DATA_LOSS: errors.CorruptTransfer,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}
_BY_NAME: Final[dict[str, type[PdServeError]]] = {
    # Types whose own attributes do not travel come back as their nearest base.
    "InvalidRequest": errors.InvalidRequest,
    "PromptTooLong": errors.PromptTooLong,
    "ModelNotFound": errors.ModelNotFound,
    "RequestNotFound": errors.RequestNotFound,
    "Overloaded": errors.Overloaded,
    "BlockPoolExhausted": errors.Overloaded,
    "NoWorkers": errors.NoWorkers,
    "WorkerLost": errors.WorkerLost,
    "DeadlineExceeded": errors.DeadlineExceeded,
    "RequestCancelled": errors.RequestCancelled,
    "TransferError": errors.TransferError,
    "PeerLost": errors.TransferError,
    "TransferTimeout": errors.TransferError,
    "CorruptTransfer": errors.CorruptTransfer,
    "ConfigError": errors.ConfigError,
    "Unauthenticated": errors.Unauthenticated,
    "PermissionDenied": errors.PermissionDenied,
}


def error_from(code: grpc.StatusCode, details: str, metadata: Iterable[Any]) -> PdServeError:
    """The typed error of a failed call; its message is the server's, word for word.

    metadata: (key, value) pairs, of whatever type each flavour of gRPC makes them.
    """
    said = {key: value for key, value in metadata if isinstance(value, str)}
    name = said.get("pdserve-error", "")
    cls = _BY_NAME.get(name) or _BY_STATUS.get(code)
    if not name and code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        # gRPC itself refused the message before anybody read it: trying again would not help.
        said |= {"pdserve-error-field": "message", "pdserve-error-limit": "no larger than the server's max"}
        cls, details = errors.InvalidRequest, f"message: {details}"
    if cls is None:
        return PdServeError(f"{code.name}: {details}")
    # Constructors would word the message anew.
    error = cls.__new__(cls)
    Exception.__init__(error, details)
    _restore_attributes(error, said, details)
    return error


def _restore_attributes(error: PdServeError, said: dict[str, str], details: str) -> None:
    if isinstance(error, errors.InvalidRequest):
        error.field = said.get("pdserve-error-field", "")
        error.value = said.get("pdserve-error-value", "")
        error.limit = said.get("pdserve-error-limit", details)
    elif isinstance(error, errors.Overloaded):
        after = said.get("retry-after-ms", "")
        error.retry_after_s = int(after) / 1e3 if after.isdigit() else None
    elif isinstance(error, errors.WorkerLost):
        error.worker = said.get("pdserve-error-worker", "server")
    elif isinstance(error, errors.ModelNotFound):
        error.model, error.known = said.get("pdserve-error-model", ""), ()
