"""Where workers are: one placement group for each, so that what it took goes back to Ray when it goes.

A group has one bundle, which Ray never divides between nodes. Ray's autoscaler is told the sum of all that is
wanted whenever that changes (`request_resources`): it brings nodes for workers that are added, and may take
nodes away that no worker needs any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from ray.autoscaler.sdk import request_resources
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from pdserve.cluster.placement import PlacementPlan, WorkerSlot
from pdserve.cluster.ray_session import NAMESPACE
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId

Ask = Callable[[Sequence[dict[str, float]]], None]


def ask_autoscaler(bundles: Sequence[dict[str, float]]) -> None:
    """Have a cluster in which all of these fit; holds until the next call."""
    request_resources(bundles=list(bundles))


class WorkerGroups:
    """The placement groups of one deployment's workers."""

    def __init__(self, plan: PlacementPlan, *, detached: bool, ask: Ask = ask_autoscaler) -> None:
        """detached: they outlive this process, and those that another one left are found."""
        self._plan, self._detached, self._ask = plan, detached, ask
        self._groups: dict[WorkerId, PlacementGroup] = {}
        self._bundles: dict[WorkerId, dict[str, float]] = {}

    def claim(self, slots: Sequence[WorkerSlot]) -> None:
        """Ask for places; `placed` waits for them."""
        for slot in slots:
            self._bundles[slot.worker] = self._plan.bundle(slot.role, slot.ranks)
            self._groups[slot.worker] = self._group(slot.worker)
        self._ask(list(self._bundles.values()))

    async def placed(self, slots: Sequence[WorkerSlot], timeout_s: float) -> dict[WorkerId, str]:
        """The node of each of them, once all have one. Raises `ConfigError` when that takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                for slot in slots:
                    await self._groups[slot.worker].ready()
        except TimeoutError:
            wanted = self._bundles[slots[0].worker]
            raise ConfigError(
                f"the cluster had no room for {', '.join(slot.worker for slot in slots)} ({wanted} each) "
                f"within {timeout_s:g} s; free some, or start fewer"
            ) from None
        return {slot.worker: self.node_of(slot.worker) for slot in slots}

    def node_of(self, worker: WorkerId) -> str:
        """Ray moves the bundle of a node that is gone to another; empty while it has none."""
        node: str = placement_group_table(self._groups[worker])["bundles_to_node_id"].get(0) or ""
        return node

    def of(self, worker: WorkerId) -> PlacementGroup:
        return self._groups[worker]

    def release(self, worker: WorkerId) -> None:
        """Give its place back. Unknown ones: nothing."""
        group = self._groups.pop(worker, None)
        if self._bundles.pop(worker, None) is not None:
            self._ask(list(self._bundles.values()))
        if group is not None:
            remove_placement_group(group)

    def forget_left(self, worker: WorkerId) -> None:
        """Give back what a killed launcher left of a worker that is no more."""
        with contextlib.suppress(ValueError):
            remove_placement_group(get_placement_group(group_name(worker)))

    def release_all(self) -> None:
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()
        self._bundles.clear()
        self._ask([])

    def _group(self, worker: WorkerId) -> PlacementGroup:
        name, bundles = group_name(worker), [self._bundles[worker]]
        if self._detached:
            with contextlib.suppress(ValueError):  # there is none
                left: PlacementGroup = get_placement_group(name)
                if left.bundle_specs == bundles:
                    return left
                remove_placement_group(left)
        made: PlacementGroup = placement_group(
            bundles, strategy="STRICT_PACK", name=name, lifetime="detached" if self._detached else None
        )
        return made


def group_name(worker: WorkerId) -> str:
    return f"{NAMESPACE}-{worker}"
