"""Every error pdserve raises on purpose.

PdServeError
├── InvalidRequest            a field of a request is wrong: names field, value, limit   INVALID_ARGUMENT
│   └── PromptTooLong         prompt (+ output) does not fit the context                 INVALID_ARGUMENT
├── ModelNotFound             no such model is served, or no such model name              NOT_FOUND
├── Unauthenticated           no API key, or none that is known                          UNAUTHENTICATED
├── PermissionDenied          the key does not allow this                                PERMISSION_DENIED
├── RequestNotFound           nothing is remembered of a request                         NOT_FOUND
├── Overloaded                refused early, with a retry hint                           RESOURCE_EXHAUSTED
│   └── BlockPoolExhausted    wanted n blocks, m free                                    RESOURCE_EXHAUSTED
├── NoWorkers                 no live worker of a role                                   UNAVAILABLE
├── WorkerLost                the worker of a request died                               UNAVAILABLE
├── DeadlineExceeded          the request's own deadline, or a lease                     DEADLINE_EXCEEDED
├── RequestCancelled          the client went away or cancelled                          CANCELLED
├── TransferError             a KV transfer ended as failed                              UNAVAILABLE
│   ├── PeerLost              the other side is gone
│   ├── TransferTimeout       deadline passed before the transfer was terminal
│   ├── FingerprintMismatch   peers disagree about model, layout or protocol             FAILED_PRECONDITION
│   └── CorruptTransfer       counts or digest of a hand-over do not match               DATA_LOSS
├── CheckpointError           a checkpoint cannot be served: names file, tensor, expectation
│   ├── UnsupportedArchitecture
│   ├── MissingTensor
│   └── ShapeMismatch
├── ConfigError               configuration or command line: says what to change
├── ProtocolError             a frame or message that cannot be decoded
├── NoValidToken              logits that are not numbers, or every token masked
├── IllegalTransition         a phase change outside the table: our own bug
└── InvariantViolated         blocks not conserved, double free, reuse under write: our own bug
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar


class ErrorCode(StrEnum):
    """The gRPC status an error becomes at the edge; names are those of `grpc.StatusCode`."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"


class PdServeError(Exception):
    """Base of the tree. `code` is the status at the edge; `retryable` says a new attempt may succeed."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    retryable: ClassVar[bool] = False


class InvalidRequest(PdServeError):
    code = ErrorCode.INVALID_ARGUMENT

    def __init__(self, *, field: str, value: object, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        self.field, self.value, self.limit = field, value, limit
        super().__init__(f"{field}: got {shown}, must be {limit}")


class PromptTooLong(InvalidRequest):
    def __init__(self, *, prompt_tokens: int, max_model_len: int) -> None:
        super().__init__(
            field="prompt",
            value=f"{prompt_tokens} tokens",
            limit=f"at most {max_model_len - 1} tokens (context {max_model_len}, one left for the answer)",
        )


class ModelNotFound(PdServeError):
    code = ErrorCode.NOT_FOUND

    def __init__(self, model: str, known: Sequence[str]) -> None:
        self.model, self.known = model, tuple(known)
        names = ", ".join(sorted(known)) or "none"
        what = f"model {model!r} is not here; known" if model else "several models are served, name one"
        super().__init__(f"{what}: {names}")


class Unauthenticated(PdServeError):
    """The caller did not say who it is, or nobody knows it."""

    code = ErrorCode.UNAUTHENTICATED


class PermissionDenied(PdServeError):
    """The caller is known, and may not do this."""

    code = ErrorCode.PERMISSION_DENIED


class RequestNotFound(PdServeError):
    code = ErrorCode.NOT_FOUND

    def __init__(self, request: str, remembered: int) -> None:
        super().__init__(
            f"nothing is known of request {request!r}; the last {remembered} are remembered"
            if request
            else "there has been no request yet, or none is remembered (coordinator.explain_last)"
        )


class Overload(StrEnum):
    """Why a request is refused early: what a metric can count."""

    NO_ROOM = "no_room"
    """No worker has a place."""
    NO_BLOCKS = "no_blocks"
    QUEUE_FULL = "queue_full"
    QUEUE_TTL = "queue_ttl"
    """It waited as long as it may."""
    TENANT_LIMIT = "tenant_limit"
    DEADLINE = "deadline"
    """Its first token cannot come before that."""
    TTFT_TARGET = "ttft_target"
    TPOT_TARGET = "tpot_target"


class Overloaded(PdServeError):
    code = ErrorCode.RESOURCE_EXHAUSTED
    retryable = True

    def __init__(
        self, reason: str, *, retry_after_s: float | None = None, why: Overload = Overload.NO_ROOM
    ) -> None:
        self.retry_after_s, self.why = retry_after_s, why
        hint = "" if retry_after_s is None else f"; retry after {retry_after_s:.1f} s"
        super().__init__(reason + hint)


class BlockPoolExhausted(Overloaded):
    def __init__(self, *, wanted: int, free: int) -> None:
        self.wanted, self.free = wanted, free
        super().__init__(f"wanted {wanted} KV blocks, {free} free", why=Overload.NO_BLOCKS)


class NoWorkers(PdServeError):
    code = ErrorCode.UNAVAILABLE
    retryable = True

    def __init__(self, role: str, model: str) -> None:
        super().__init__(f"no live {role} worker for model {model!r}; workers may be starting, try again")


class WorkerLost(PdServeError):
    code = ErrorCode.UNAVAILABLE
    retryable = True

    def __init__(self, worker: str, why: str) -> None:
        self.worker = worker
        super().__init__(f"worker {worker} was lost: {why}")


class DeadlineExceeded(PdServeError):
    code = ErrorCode.DEADLINE_EXCEEDED


class RequestCancelled(PdServeError):
    code = ErrorCode.CANCELLED


class TransferError(PdServeError):
    code = ErrorCode.UNAVAILABLE
    retryable = True


class PeerLost(TransferError):
    def __init__(self, peer: str, why: str) -> None:
        self.peer = peer
        super().__init__(f"transfer peer {peer} is gone: {why}")


class TransferTimeout(TransferError):
    def __init__(self, transfer: str, timeout_s: float) -> None:
        super().__init__(f"transfer {transfer} was not terminal after {timeout_s:.3f} s")


class FingerprintMismatch(TransferError):
    code = ErrorCode.FAILED_PRECONDITION
    retryable = False

    def __init__(self, peer: str, field: str, ours: object, theirs: object) -> None:
        self.peer, self.field = peer, field
        super().__init__(
            f"peer {peer} has {field}={theirs!r}, this worker has {field}={ours!r}; "
            "start both with the same model, dtype and block size"
        )


class CorruptTransfer(TransferError):
    code = ErrorCode.DATA_LOSS


class CheckpointError(PdServeError):
    code = ErrorCode.FAILED_PRECONDITION


class UnsupportedArchitecture(CheckpointError):
    def __init__(self, found: str, supported: Sequence[str], file: str) -> None:
        super().__init__(f"{file}: architecture {found!r} is not supported; one of {', '.join(supported)} is")


class MissingTensor(CheckpointError):
    def __init__(self, tensor: str, file: str) -> None:
        self.tensor, self.file = tensor, file
        super().__init__(f"{file}: tensor {tensor!r} is missing")


class ShapeMismatch(CheckpointError):
    def __init__(self, tensor: str, file: str, wanted: Sequence[int], found: Sequence[int]) -> None:
        self.tensor, self.file = tensor, file
        super().__init__(f"{file}: tensor {tensor!r} has shape {list(found)}, config asks {list(wanted)}")


class ConfigError(PdServeError):
    code = ErrorCode.FAILED_PRECONDITION


class ProtocolError(PdServeError):
    code = ErrorCode.FAILED_PRECONDITION


class NoValidToken(PdServeError):
    """A row of logits from which no token can be drawn; only its own request ends."""


class IllegalTransition(PdServeError):
    def __init__(self, request: str, before: str, after: str, history: Sequence[tuple[float, str]]) -> None:
        path = " -> ".join(str(phase) for _, phase in history)
        super().__init__(f"request {request}: {before} -> {after} is not a transition; it went {path}")


class InvariantViolated(PdServeError):
    pass
