"""What reaches a worker's scheduler, and what it asks to be done: both plain data.

The schedulers of `prefill` and `decode` are pure: `handle(event, now) -> actions`. The compute loop feeds
them from its inbox and performs what they return, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from kvtransfer.protocol import Push, TransferEvent
from pdserve.core.ids import AttemptId, WorkerId
from pdserve.core.messages import ConnectPeer, Message
from pdserve.engine.tiers.store import TierCommand, TierEvent

OwnerId = NewType("OwnerId", int)
"""One connection of one coordinator; a coordinator that reconnects is a new owner."""


@dataclass(frozen=True, slots=True)
class FromCoordinator:
    owner: OwnerId
    message: Message


@dataclass(frozen=True, slots=True)
class CoordinatorLost:
    """The connection ended: nobody waits for the answers to its requests."""

    owner: OwnerId


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """By this worker's own process: it was told to end, or its machine is about to be taken away."""

    until: float | None
    """When the process ends even if it is not empty, on the compute loop's clock. None: it stays."""


@dataclass(frozen=True, slots=True)
class UndrainAsked:
    """By this worker's own process: it stays after all."""


Event = FromCoordinator | CoordinatorLost | DrainAsked | UndrainAsked | TransferEvent | TierEvent


@dataclass(frozen=True, slots=True)
class Send:
    """Put a message into the owner's next frame."""

    owner: OwnerId
    message: Message


@dataclass(frozen=True, slots=True)
class SubmitPush:
    push: Push


@dataclass(frozen=True, slots=True)
class ConnectTransfer:
    peer: ConnectPeer


@dataclass(frozen=True, slots=True)
class DisconnectTransfer:
    """That process of the peer is gone for certain."""

    peer: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True)
class MoveTier:
    """Copy blocks between the pool and the tiers below it."""

    command: TierCommand


Action = Send | SubmitPush | ConnectTransfer | DisconnectTransfer | MoveTier
Actions = Sequence[Action]


def attempt_of(message: Message) -> AttemptId | None:
    """The attempt that a message is about, if it is about one."""
    spec = getattr(message, "spec", None)
    attempt = getattr(message if spec is None else spec, "attempt", None)
    return attempt if isinstance(attempt, AttemptId) else None
