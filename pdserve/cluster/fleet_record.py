"""Which workers a deployment has, kept where they outlive `pdserve serve`: in Ray's own key-value store.

Without it, the next `pdserve serve` would know the workers that its configuration names, and neither those
that were added since nor those that were retired.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from pdserve.cluster.placement import WorkerSlot
from pdserve.cluster.ray_session import NAMESPACE
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role

_KEY: Final = "fleet"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    worker: str
    role: Role
    index: int
    model: int
    ranks: int
    leaving: bool


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: str
    """Of the deployment's settings: another deployment's fleet means nothing."""
    workers: tuple[_Entry, ...]


def save(identity: str, slots: dict[WorkerSlot, bool]) -> None:
    """slots: every worker there shall be, or still is; whether it is being retired."""
    entries = tuple(
        _Entry(
            worker=slot.worker,
            role=slot.role,
            index=slot.index,
            model=slot.model,
            ranks=slot.ranks,
            leaving=leaving,
        )
        for slot, leaving in slots.items()
    )
    text = _Record(identity=identity, workers=entries).model_dump_json()
    _internal_kv_put(_KEY, text, overwrite=True, namespace=NAMESPACE)


def load(identity: str) -> dict[WorkerSlot, bool] | None:
    """What the last `pdserve serve` of the same settings saved; None: there was none."""
    found: bytes | None = _internal_kv_get(_KEY, namespace=NAMESPACE)
    if found is None:
        return None
    try:
        record = _Record.model_validate_json(found)
    except ValidationError:  # an older version's
        return None
    if record.identity != identity:
        return None
    return {
        WorkerSlot(
            worker=WorkerId(entry.worker),
            role=entry.role,
            index=entry.index,
            model=entry.model,
            ranks=entry.ranks,
        ): entry.leaving
        for entry in record.workers
    }


def forget() -> None:
    _internal_kv_del(_KEY, namespace=NAMESPACE)
