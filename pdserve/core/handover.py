"""What workers tell each other inside a transfer's notification: whose a push is, and how to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from pdserve.core.ids import AttemptId
from pdserve.core.sampling import TokenLogprobs

HANDOVER_VERSION: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Rides on the last push of an attempt: what the decode worker needs to go on as if it had prefilled.

    Penalty counts and the sampling position follow from the tokens, which the decode worker has from
    `StartDecode`; seed and parameters too. Grammar, adapter and draft state get fields here when they exist,
    with a new version.
    """

    version: int
    attempt: AttemptId
    num_tokens: int
    """Tokens whose KV was computed; must equal len(spec.tokens) + len(tokens)."""
    num_pushes: int
    """Pushes of this attempt, this one included; the decode worker counts them."""
    bytes_moved: int
    first_token: int
    """The next one, whose KV nobody has computed."""
    logprobs: TokenLogprobs | None
    tokens: list[int] = field(default_factory=list)
    """Of a migration: between `spec.tokens` and `first_token`. The coordinator may not have heard of them."""
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Empty, or one for each of `tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushNote:
    """What every push carries as its notification: whose it is, and the hand-over on the last one."""

    attempt: AttemptId
    sequence: int
    handover: Handover | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixNote:
    """Rides on the one push of a `PushPrefix`: how much of the prefix is in the peer's blocks now."""

    attempt: AttemptId
    num_tokens: int
    """Whole blocks, those that were cached at the peer included."""
