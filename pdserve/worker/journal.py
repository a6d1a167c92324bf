"""What a worker is asked and answers about requests, as log lines; one per message, none per token.

Written on the channel's thread, so that a step waits for no line.
"""

from __future__ import annotations

import logging

from pdserve.core.ids import AttemptId
from pdserve.core.logs import REQUESTS, about
from pdserve.core.messages import (
    AttemptFailed,
    Cancel,
    KvArrived,
    Message,
    Migrate,
    Preempted,
    PrefillDone,
    PrefillStarted,
    Refused,
    Reserved,
    StartDecode,
    StartPrefill,
    Tokens,
    TransferDone,
)

log = logging.getLogger(REQUESTS)


class Journal:
    """`note` every message that comes or goes."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled and log.isEnabledFor(logging.INFO)

    def note(self, message: Message) -> None:
        if not self._enabled or (type(message) is Tokens and message.finish_reason is None):
            return
        entry = entry_of(message)
        if entry is not None:
            attempt, text, fields = entry
            level = logging.WARNING if type(message) is AttemptFailed else logging.INFO
            log.log(level, text, extra=about(attempt.request, attempt, **fields))


def entry_of(message: Message) -> tuple[AttemptId, str, dict[str, object]] | None:
    """Whose, what and the figures; None for a message that is not worth a line."""
    match message:
        case StartDecode(spec=spec, prefill_worker=reader):
            return (
                spec.attempt,
                "asked to reserve blocks",
                {"tokens": len(spec.tokens), "prefill_worker": reader},
            )
        case Reserved(attempt=attempt, blocks=blocks, cached_tokens=cached):
            return attempt, "reserved", {"blocks": len(blocks), "cached_tokens": cached}
        case Refused(attempt=attempt, reason=reason, detail=detail):
            return attempt, "refused", {"reason": reason.value, "detail": detail}
        case StartPrefill(spec=spec, decode_worker=decode, dst_cached_tokens=cached):
            asked = {"tokens": len(spec.tokens), "decode_worker": decode, "cached_there": cached}
            return spec.attempt, "asked to read a prompt", asked
        case PrefillStarted(attempt=attempt, cached_tokens=cached, queue_s=queue_s):
            return attempt, "prefill begins", {"cached_tokens": cached, "queue_ms": _ms(queue_s)}
        case PrefillDone(attempt=attempt, compute_s=compute_s):
            return attempt, "prompt read", {"compute_ms": _ms(compute_s)}
        case TransferDone(attempt=attempt):
            figures = {"bytes": message.bytes_moved, "path": message.path, "busy_ms": _ms(message.busy_s)}
            return attempt, "KV sent", figures | {"exposed_ms": _ms(message.exposed_s)}
        case KvArrived(attempt=attempt):
            return attempt, "KV arrived", {}
        case Tokens(attempt=attempt, finish_reason=reason):
            count = message.first_index + len(message.tokens)
            return attempt, "answer complete", {"reason": reason, "output_tokens": count}
        case Migrate(attempt=attempt, to=to, decode_worker=decode):
            return attempt, "asked to move it", {"to": str(to), "decode_worker": decode}
        case Preempted(attempt=attempt):
            return attempt, "interrupted", {}
        case Cancel(attempt=attempt, reason=reason):
            return attempt, "told to stop", {"reason": reason}
        case AttemptFailed(attempt=attempt, code=code, message=text):
            return attempt, "failed", {"code": code, "error": text}
        case _:
            return None


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
