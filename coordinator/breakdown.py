"""Where a request's time went, from the history of its phases: what a missed target is blamed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from pdserve.core.lifecycle import Phase

History = Sequence[tuple[float, Phase]]

_WRITING: Final = {
    Phase.TRANSFERRING: "transfer",
    Phase.DECODING: "decode",
    Phase.MIGRATING: "moving",
}
"""After the first token. Any other phase then is a new attempt's: `retry`."""


def before_first_token(
    history: History, first_token_at: float, *, prefill_queue_s: float
) -> dict[str, float]:
    """Seconds by part, up to the first token. What earlier attempts took is `retry`."""
    begun = max(at for at, phase in history if phase is Phase.QUEUED and at <= first_token_at)
    parts = {"queue": 0.0, "prefill_queue": 0.0, "prefill": 0.0, "retry": begun - history[0][0]}
    for start, end, phase in _spans(history, first_token_at):
        if start >= begun:
            parts["queue" if phase in (Phase.QUEUED, Phase.ADMITTED) else "prefill"] += end - start
    waited = min(prefill_queue_s, parts["prefill"])
    parts["prefill_queue"] += waited
    parts["prefill"] -= waited
    return parts


def after_first_token(history: History, first_token_at: float, last_token_at: float) -> dict[str, float]:
    """Seconds by part, from the first token to the last."""
    parts = dict.fromkeys((*_WRITING.values(), "retry"), 0.0)
    for start, end, phase in _spans(history, last_token_at):
        if end > first_token_at:
            parts[_WRITING.get(phase, "retry")] += end - max(start, first_token_at)
    return parts


def longest(parts: dict[str, float]) -> str:
    return max(parts, key=parts.__getitem__)


def _spans(history: History, until: float) -> Iterator[tuple[float, float, Phase]]:
    ends = [at for at, _ in history[1:]] + [until]
    for (start, phase), end in zip(history, ends, strict=True):
        if start < until:
            yield start, min(end, until), phase
