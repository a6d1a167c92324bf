"""How an error becomes the end of an attempt."""

from __future__ import annotations

from pdserve.core.errors import ErrorCode, InvalidRequest, PdServeError
from pdserve.core.ids import AttemptId
from pdserve.core.messages import AttemptFailed, Role


class AttemptInUse(InvalidRequest):
    """Two coordinators minted the same id, or one used it again before its pushes were settled."""

    def __init__(self, attempt: AttemptId) -> None:
        super().__init__(field="attempt", value=str(attempt), limit="new to this worker")


def attempt_failed(attempt: AttemptId, error: Exception) -> AttemptFailed:
    """Typed errors keep their code; anything else is INTERNAL, and another attempt may do better."""
    if isinstance(error, PdServeError):
        return AttemptFailed(
            attempt=attempt, code=error.code.value, message=str(error), retryable=error.retryable
        )
    message = f"{type(error).__name__}: {error}"
    return AttemptFailed(attempt=attempt, code=ErrorCode.INTERNAL.value, message=message, retryable=True)


class WrongRole(InvalidRequest):
    """The worker has taken up another role meanwhile; another attempt will go elsewhere."""

    retryable = True

    def __init__(self, worker: str, role: Role) -> None:
        super().__init__(field="role", value=str(role), limit=f"prefill, for worker {worker} to read prompts")
