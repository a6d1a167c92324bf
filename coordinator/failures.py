"""Typed errors from what workers say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, assert_never

from pdserve.core.errors import (
    BlockPoolExhausted,
    ConfigError,
    CorruptTransfer,
    DeadlineExceeded,
    ErrorCode,
    InvalidRequest,
    Overloaded,
    PdServeError,
    PromptTooLong,
    RequestCancelled,
    TransferError,
)
from pdserve.core.ids import WorkerId
from pdserve.core.layout import blocks_for
from pdserve.core.messages import AttemptFailed, RefusalReason, Refused, WorkerInfo

_BY_CODE: Final[dict[str, Callable[[str], PdServeError]]] = {
    ErrorCode.UNAVAILABLE: TransferError,
    ErrorCode.RESOURCE_EXHAUSTED: Overloaded,
    ErrorCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    ErrorCode.CANCELLED: RequestCancelled,
    ErrorCode.FAILED_PRECONDITION: ConfigError,
    ErrorCode.DATA_LOSS: CorruptTransfer,
}


def failure_of(message: AttemptFailed, worker: WorkerId) -> PdServeError:
    """The error of an attempt that failed on `worker`; an unknown code becomes INTERNAL."""
    text = f"worker {worker}: {message.message}"
    if message.code == ErrorCode.INVALID_ARGUMENT:
        return InvalidRequest(field="request", value=str(message.attempt.request), limit=text)
    return _BY_CODE.get(message.code, PdServeError)(text)


def refusal_of(message: Refused, num_tokens: int, info: WorkerInfo) -> PdServeError:
    """The error that a refusal would be, if no other worker takes the request."""
    match message.reason:
        case RefusalReason.TOO_LONG:
            return PromptTooLong(prompt_tokens=num_tokens, max_model_len=info.max_model_len)
        case RefusalReason.NO_BLOCKS:
            return BlockPoolExhausted(wanted=blocks_for(num_tokens + 1, info.block_tokens), free=0)
        case RefusalReason.UNKNOWN_PEER:
            return TransferError(f"worker {info.worker}: {message.detail}")
        case RefusalReason.BATCH_FULL | RefusalReason.DRAINING | RefusalReason.WRONG_ROLE:
            return Overloaded(f"worker {info.worker}: {message.detail or message.reason}")
        case _:
            assert_never(message.reason)
