"""A worker's change from one role to the other, from `ChangeRole` to `RoleChanged`. Pure."""

from __future__ import annotations

from decode.scheduler import DecodeScheduler
from pdserve.core.ids import AttemptId
from pdserve.core.messages import Role, RoleChanged
from pdserve.worker.events import Action, OwnerId, Send
from pdserve.worker.shared import Shared
from prefill.scheduler import PrefillScheduler


class RoleChange:
    """New requests follow the new role at once; this waits for the old one's to be gone, and says so."""

    def __init__(self, shared: Shared, prefill: PrefillScheduler, decode: DecodeScheduler) -> None:
        self._shared, self._prefill, self._decode = shared, prefill, decode
        self._owners: set[OwnerId] = set()
        self._leaving: set[AttemptId] | None = None
        """Requests of the old role; None: no change is under way."""

    def met(self, owner: OwnerId) -> None:
        self._owners.add(owner)

    def lost(self, owner: OwnerId) -> None:
        self._owners.discard(owner)

    def asked(self, owner: OwnerId, role: Role) -> list[Action]:
        if role is self._shared.duty.role:
            return [] if self._leaving is not None else [Send(owner, self._changed())]
        before = self._decode.attempts if role is Role.PREFILL else self._prefill.attempts
        self._shared.duty.role, self._leaving = role, set(before)
        return self.sweep()

    def sweep(self) -> list[Action]:
        if self._leaving is None:
            return []
        here = {*self._decode.attempts, *self._prefill.attempts}
        self._leaving &= here
        if self._leaving:
            return []
        self._leaving = None
        return [Send(owner, self._changed()) for owner in sorted(self._owners)]

    def _changed(self) -> RoleChanged:
        shared = self._shared
        return RoleChanged(worker=shared.worker, epoch=shared.epoch, role=shared.duty.role)
