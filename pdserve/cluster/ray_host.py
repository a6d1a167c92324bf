"""Workers as Ray actors: placement groups, named actors, and how their deaths are noticed.

`max_restarts=0` on purpose: Ray then reports a death in 10 ms; with restarts of its own it takes over a
second, and nobody would tell the coordinator. The supervisor makes the successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil
import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.placement_group import remove_placement_group as remove_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pdserve.cluster import fleet_record
from pdserve.cluster.groups import WorkerGroups
from pdserve.cluster.placement import (
    PlacementPlan,
    WorkerSlot,
    next_slot,
    require_room,
    slot_cores,
    slot_ranks,
)
from pdserve.cluster.ray_session import NAMESPACE, RaySession
from pdserve.cluster.ray_worker import OnProgress, RayWorker, first_line
from pdserve.cluster.worker_specs import HostedModel, WorkerSpecs
from pdserve.core.config import ServeConfig
from pdserve.core.errors import ConfigError, WorkerLost
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.elastic.actor import DecodeActor, PrefillActor
from pdserve.worker.hosting import Described, HostedWorker, Progress
from pdserve.worker.ranks.actor import RankActor
from pdserve.worker.spec import WorkerSpec

log = logging.getLogger(__name__)

_ACTOR_OF: Final[dict[Role, type[HostedWorker]]] = {Role.PREFILL: PrefillActor, Role.DECODE: DecodeActor}
_ACTOR_THREADS: Final = 8
"""`start` and `wait` hold one each; the rest answer pings and snapshots."""
_NAME_RELEASE_S: Final = 10.0
_LOOK_AT_NODES_S: Final = 1.0
_LAST_WORDS_S: Final = 1.0
_DESCRIBE_S: Final = 2.0
"""A worker that was left running answers at once, unless it is stopped."""


def draining_nodes() -> Mapping[str, int]:
    """Nodes that were told to go (a preemption notice, an autoscaler), as Ray's GCS knows them."""
    nodes: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    return nodes


class RayHost:
    """Places the workers of one deployment. `reserve` first, then `launch` any slot any number of times."""

    def __init__(
        self,
        session: RaySession,
        plan: PlacementPlan,
        config: ServeConfig,
        models: Sequence[HostedModel],
        on_progress: OnProgress,
        identity: str = "",
    ) -> None:
        """models: in the order of the configuration, as `WorkerSlot.model` counts them.

        identity: of the settings; workers that were started with the same ones can be taken over.
        """
        self._models = tuple(models)
        self._session, self._plan, self._config = session, plan, config
        self._identity = identity
        self._left: dict[WorkerId, Any] = {}
        self._workers: dict[WorkerId, RayWorker] = {}
        self._going: frozenset[str] = frozenset()
        """Nodes that will be taken away."""
        self._on_progress = on_progress
        self._groups = WorkerGroups(plan, detached=self.outlives_us)
        self._slots: dict[WorkerSlot, bool] = {}
        """Every worker there shall be, or still is; whether it is being retired."""
        self._ever: set[WorkerSlot] = set()
        """Also those that are no more: no name is used twice."""
        self._node_of: dict[WorkerId, str] = {}
        self._pinned: dict[WorkerId, tuple[int, ...]] = {}
        self._specs = WorkerSpecs(session, plan, config, models, identity, self._node_of, self._pinned)

    @property
    def outlives_us(self) -> bool:
        """Workers are detached actors: they live on when this process is killed."""
        return self._config.cluster.linger_s > 0

    @property
    def num_left(self) -> int:
        """Workers of a killed launcher that may live, and that `launch` has not looked at yet."""
        return len(self._left)

    @property
    def slots(self) -> tuple[WorkerSlot, ...]:
        """Every worker there shall be, or still is: those of the plan, but for what was added and retired."""
        return tuple(self._slots)

    @property
    def leaving(self) -> tuple[WorkerSlot, ...]:
        """Those that were being retired when the launcher before this one was killed."""
        return tuple(slot for slot, leaving in self._slots.items() if leaving)

    async def reserve(self) -> None:
        """Make a placement group for each worker, or find those a killed launcher left.

        Raises `ConfigError` without room.
        """
        self._slots = self._wanted()
        self._ever |= self._slots.keys()
        # The role that is choosier about its nodes takes them first, as it was planned.
        choosy = sorted(self._slots, key=lambda s: (s.role not in self._plan.node_resources, -s.ranks))
        self._groups.claim(choosy)
        await self._place(choosy, self._config.cluster.start_timeout_s)

    def _wanted(self) -> dict[WorkerSlot, bool]:
        """The workers of the plan, or those that a killed launcher had; notes which of them live."""
        planned = dict.fromkeys(self._plan.slots, False)
        if not self.outlives_us:
            return planned
        known = fleet_record.load(self._identity) or planned
        self._ever |= known.keys()
        self._left = {slot.worker: actor for slot in known if (actor := _find(slot.worker))}
        if self._left:
            log.warning("found %s running; taking over", ", ".join(sorted(self._left)))
        wanted = {}
        for slot, leaving in known.items():
            if slot.worker in self._left or (slot in planned and not leaving):
                wanted[slot] = leaving
            else:  # it was about to start, or has ended: nothing of it is left
                self._groups.forget_left(slot.worker)
        return wanted

    async def _place(self, slots: Sequence[WorkerSlot], timeout_s: float) -> None:
        self._node_of |= await self._groups.placed(slots, timeout_s)
        nodes = self._session.nodes()
        for slot in sorted(slots, key=lambda slot: (slot.role is not Role.PREFILL, slot.index)):
            self._pinned |= slot_cores(self._plan, slot, self._pinned, self._node_of, nodes)
        self._record()

    def _record(self) -> None:
        if self.outlives_us:
            fleet_record.save(self._identity, self._slots)

    def release(self) -> None:
        """Give all places back."""
        self._groups.release_all()
        if self.outlives_us:
            fleet_record.forget()

    # --- workers that are added and retired -------------------------------------------------------------

    def add_slot(self, role: Role, model: int) -> WorkerSlot:
        """A new worker's, which has no place yet."""
        slot = next_slot(self._plan, self._config, self._ever, role, model)
        self._ever.add(slot)
        return slot

    async def place(self, slot: WorkerSlot, timeout_s: float) -> None:
        """Find a place for it; on a cluster that others run, Ray's autoscaler may bring a node.

        Raises `ConfigError` when there is none: at once on a machine of our own, else after `timeout_s`.
        """
        if self._session.local:
            require_room(self._plan, self.slots, slot, self._session.nodes())
        with contextlib.ExitStack() as undo:
            undo.callback(self.give_back, slot)
            self._slots[slot] = False
            self._groups.claim([slot])
            await self._place([slot], timeout_s)
            undo.pop_all()

    def retires(self, slot: WorkerSlot) -> None:
        """It will be given back, also if this process is killed meanwhile."""
        self._slots[slot] = True
        self._record()

    def give_back(self, slot: WorkerSlot) -> None:
        """It is no more, or never was. Unknown ones: nothing."""
        self._groups.release(slot.worker)
        self._slots.pop(slot, None)
        self._workers.pop(slot.worker, None)
        for rank in slot_ranks(slot):
            self._pinned.pop(rank, None)
        self._node_of.pop(slot.worker, None)
        self._record()

    def devices(self, role: Role, model: int) -> float:
        """What one worker takes: GPUs, or cores where it computes on a CPU."""
        one = self._models[model].config
        ranks = (one.prefill if role is Role.PREFILL else one.decode).tensor_parallel_size
        return ranks * (self._plan.gpus_per_worker if self._plan.uses_gpus else self._plan.cpus_per_worker)

    # --- processes --------------------------------------------------------------------------------------

    async def launch(self, slot: WorkerSlot, epoch: int) -> RayWorker:
        """Start one worker and wait until it listens, or take over one that was left running.

        Raises `WorkerLost` or what the worker reported.
        """
        left = self._left.pop(slot.worker, None)
        worker = None if left is None else await self._adopt(slot, left)
        if worker is None:
            worker = await self._launch(slot, epoch)
        self._workers[slot.worker] = worker
        return worker

    async def watch_nodes(self, draining: Callable[[], Mapping[str, int]] = draining_nodes) -> None:
        """Drain the workers of every node that Ray says will be taken away. Runs until it is cancelled.

        draining: such nodes and when they go, in milliseconds of wall clock; 0: not known.
        """
        told: set[tuple[WorkerId, int]] = set()
        while True:
            try:
                gone_at = await asyncio.to_thread(draining)
            except (ray.exceptions.RayError, RuntimeError) as error:
                log.warning("Ray does not say which nodes go: %s", first_line(error))
                gone_at = {}
            self._going = frozenset(gone_at)
            for name, worker in tuple(self._workers.items()):
                if worker.node in gone_at and (name, worker.epoch) not in told:
                    told.add((name, worker.epoch))
                    log.warning("the node of %s is about to be taken away: draining it", name)
                    await worker.retire(_seconds_until(gone_at[worker.node]))
            await asyncio.sleep(_LOOK_AT_NODES_S)

    async def _launch(self, slot: WorkerSlot, epoch: int) -> RayWorker:
        self._find_node(slot)
        while self._node_of[slot.worker] in self._going:
            # What started there would be drained at once. `watch_nodes` sees the node go.
            await asyncio.sleep(_LOOK_AT_NODES_S)
            self._find_node(slot)
        spec = self._specs.of(slot, epoch)
        worker = await self._create_ranks(slot, spec)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(worker.kill)
            try:
                async with asyncio.timeout(self._config.cluster.start_timeout_s):
                    await worker.start(self._on_progress)
            except TimeoutError:
                raise WorkerLost(
                    slot.worker, f"not ready within {self._config.cluster.start_timeout_s:g} s"
                ) from None
            undo.pop_all()
        if self.outlives_us and worker.pidfd is not None:
            self._pid_file(slot.worker).write_text(str(worker.pid))
        return worker

    def _find_node(self, slot: WorkerSlot) -> None:
        """Ray moves the bundle of a node that is gone to another."""
        self._node_of[slot.worker] = self._groups.node_of(slot.worker) or self._node_of[slot.worker]

    async def _adopt(self, slot: WorkerSlot, actor: Any) -> RayWorker | None:
        """The worker behind `actor`; None when it cannot be used: then its process has been ended."""
        worker = RayWorker(slot.worker, actor, self._node_of[slot.worker], self._session, epoch=0)
        try:
            async with asyncio.timeout(_DESCRIBE_S):
                found: Described = await actor.describe.remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            log.warning("%s was left running but cannot be used: %s", slot.worker, first_line(error))
            worker.watch(self._left_pid(slot.worker))
            await worker.kill()
            return None
        if found.num_coordinators:
            raise ConfigError(f"another {NAMESPACE} uses {slot.worker} here; end it first")
        worker.address, worker.epoch = found.address, found.epoch
        worker.watch(found.pid)
        worker.followers = await self._found_followers(slot, found.epoch)
        if found.identity != self._identity or len(worker.followers) != slot.ranks - 1:
            log.warning("%s was started with other settings; it is started again", slot.worker)
            await worker.kill()
            return None
        for rank in (worker, *worker.followers):
            rank.follow()
        self._on_progress(slot.worker, Progress(fraction=1.0, text="taken over"))
        return worker

    async def _found_followers(self, slot: WorkerSlot, epoch: int) -> tuple[RayWorker, ...]:
        """The ranks of a worker that was left running, but for the first; those that answer."""
        found = []
        for rank in slot_ranks(slot)[1:]:
            actor = _find(_actor_name(rank))
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                async with asyncio.timeout(_DESCRIBE_S):
                    if actor is not None:
                        pid = await actor.ping.remote()
                        node = self._node_of[slot.worker]
                        found.append(RayWorker(rank, actor, node, self._session, epoch))
                        found[-1].watch(pid)
        return tuple(found)

    def _pid_file(self, worker: WorkerId) -> Path:
        return self._session.run_dir.path / f"{worker}.pid"

    def _left_pid(self, worker: WorkerId) -> int:
        """The process behind a worker that does not answer; 0 when it is not known or ended."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            pid = int(self._pid_file(worker).read_text())
            if any(word.startswith("ray::") for word in psutil.Process(pid).cmdline()):
                return pid
        return 0

    async def _create_ranks(self, slot: WorkerSlot, spec: WorkerSpec) -> RayWorker:
        """The actors of a worker: its leader, and the followers where it has several ranks."""
        made = []
        for rank, name in enumerate(slot_ranks(slot)):
            pinned = self._pinned[name]
            kind: type[Any]
            arguments: tuple[Any, ...]
            if rank == 0 or spec.ranks is None:
                kind, arguments = _ACTOR_OF[slot.role], (spec, pinned, _give_group_back)
            else:
                own = replace(spec, ranks=replace(spec.ranks, rank=rank))
                kind, arguments = RankActor, (own, pinned)
            called = slot.worker if rank == 0 else _actor_name(name)
            actor = await self._create(slot, kind, called, arguments)
            made.append(
                RayWorker(
                    slot.worker if rank == 0 else name,
                    actor,
                    self._node_of[slot.worker],
                    self._session,
                    spec.epoch,
                )
            )
        made[0].followers = tuple(made[1:])
        return made[0]

    async def _create(self, slot: WorkerSlot, kind: type[Any], name: str, arguments: tuple[Any, ...]) -> Any:
        options = ray.remote(kind).options(
            name=name,
            lifetime="detached" if self.outlives_us else None,
            max_restarts=0,
            max_concurrency=_ACTOR_THREADS,
            num_cpus=self._plan.cpus_per_worker,
            num_gpus=self._plan.gpus_per_worker,
            accelerator_type=self._plan.accelerator_type,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._groups.of(slot.worker), placement_group_bundle_index=0
            ),
        )
        deadline = asyncio.get_running_loop().time() + _NAME_RELEASE_S
        while True:
            try:
                return options.remote(*arguments)
            except ValueError as error:
                # The name of a dead actor is free a moment after its death is known, and nothing tells when.
                if asyncio.get_running_loop().time() > deadline:
                    raise WorkerLost(slot.worker, f"another {NAMESPACE} runs here: {error}") from error
                await asyncio.sleep(0.05)


def _seconds_until(wall_ms: int) -> float | None:
    """None: nobody said when. A moment is kept back for the last words."""
    return None if wall_ms == 0 else max(0.0, wall_ms / 1000 - time.time() - _LAST_WORDS_S)


def _actor_name(rank: WorkerId) -> str:
    """Of a follower."""
    return rank.replace("/", "-rank-")


def _find(worker: str) -> Any:
    try:
        return ray.get_actor(worker)
    except ValueError:
        return None


def _give_group_back() -> None:
    """In a worker that ends because nobody came back for it."""
    group = get_current_placement_group()
    if group is not None:
        remove_group(group)
