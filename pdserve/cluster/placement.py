"""Which worker gets what: pure arithmetic over the nodes of a cluster, before Ray is asked for anything.

Ray lets a placement that cannot be met wait for ever, silently; so everything that can be known beforehand is
checked here, and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pdserve.core.config import ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.worker.ranks.names import rank_id, worker_of

_ACCELERATOR_PREFIX: Final = "accelerator_type:"
_SLIVER: Final = 0.001
"""Asking for a sliver of a resource, such as `accelerator_type:X`, is how Ray finds a node that has it."""
_MAX_CPUS_PER_GPU_WORKER: Final = 8
"""A GPU worker's host side is one compute loop and one transfer thread; more cores do nothing for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of the cluster, as Ray counts it."""

    id: str
    host: str
    cpus: int
    gpus: float = 0.0
    accelerator_types: tuple[str, ...] = ()
    resources: frozenset[str] = frozenset()
    """Names of everything it offers, custom resources among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSlot:
    """One worker to be placed."""

    worker: WorkerId
    role: Role
    """In which it starts."""
    index: int
    """Its number among the workers of its role; never used again for another."""
    model: int = 0
    """Which of the configured models it serves, counted from 0."""
    ranks: int = 1
    """Processes that compute the model together, on one node (`tensor_parallel_size`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """Every worker of a deployment and what each asks of Ray."""

    prefill: tuple[WorkerSlot, ...]
    decode: tuple[WorkerSlot, ...]
    cpus_per_worker: int
    """Of one rank, as are the GPUs: a worker of several ranks has so many for each."""
    gpus_per_worker: float
    accelerator_type: str | None
    node_resources: Mapping[Role, str] = field(default_factory=dict)
    """What only the nodes of a role offer; a role that is not here goes anywhere."""

    @property
    def slots(self) -> tuple[WorkerSlot, ...]:
        return self.prefill + self.decode

    @property
    def uses_gpus(self) -> bool:
        return self.gpus_per_worker > 0

    @property
    def workers_per_gpu(self) -> int:
        """How many workers share one GPU; 1 unless a worker asks for a fraction."""
        return int(1 / self.gpus_per_worker) if 0 < self.gpus_per_worker < 1 else 1

    def bundle(self, role: Role, ranks: int = 1) -> dict[str, float]:
        """What one worker reserves. Ray never divides a bundle between nodes: all of its ranks are on one."""
        wanted: dict[str, float] = {"CPU": float(self.cpus_per_worker * ranks)}
        if self.uses_gpus:
            wanted["GPU"] = self.gpus_per_worker * ranks
        if self.accelerator_type is not None:
            wanted[_ACCELERATOR_PREFIX + self.accelerator_type] = _SLIVER
        if role in self.node_resources:
            wanted[self.node_resources[role]] = _SLIVER
        return wanted

    def fits(self, role: Role, node: Node) -> int:
        """Ranks of a role's workers that an empty node has room for."""
        only_with = self.node_resources.get(role)
        if only_with is not None and only_with not in node.resources:
            return 0
        by_cpu = node.cpus // self.cpus_per_worker
        return min(by_cpu, int(node.gpus / self.gpus_per_worker + 1e-9)) if self.uses_gpus else by_cpu


def node_from_resources(node_id: str, host: str, resources: Mapping[str, float]) -> Node:
    """A `Node` from Ray's resource map of one machine."""
    return Node(
        id=node_id,
        host=host,
        cpus=int(resources.get("CPU", 0)),
        gpus=resources.get("GPU", 0.0),
        resources=frozenset(resources),
        accelerator_types=tuple(
            sorted(
                name.removeprefix(_ACCELERATOR_PREFIX)
                for name in resources
                if name.startswith(_ACCELERATOR_PREFIX)
            )
        ),
    )


def plan_placement(config: ServeConfig, nodes: Sequence[Node]) -> PlacementPlan:
    """Divide the cluster among the workers, or raise `ConfigError` that says what is missing."""
    each = config.of_each_model
    prefill = _slots(Role.PREFILL, [(one.prefill.workers, one.prefill.tensor_parallel_size) for one in each])
    decode = _slots(Role.DECODE, [(one.decode.workers, one.decode.tensor_parallel_size) for one in each])
    num_ranks = sum(slot.ranks for slot in prefill + decode)
    for one in each:
        _require_no_tiers(one)
    wanted_type = config.cluster.accelerator_type
    if wanted_type is not None:
        nodes = _nodes_with(wanted_type, nodes)
    gpus = _gpus_per_worker(config, num_ranks, nodes)
    if 0 < gpus < 1 and num_ranks > len(prefill) + len(decode):
        raise ConfigError(
            f"workers would get {gpus:g} of a GPU: a rank (tensor_parallel_size above 1) needs one of its "
            "own; start fewer workers, or lower tensor_parallel_size"
        )
    if wanted_type is not None and gpus == 0:
        raise ConfigError(
            f"cluster.accelerator_type is {wanted_type}, but cluster.gpus_per_worker is 0; remove one"
        )
    plan = PlacementPlan(
        prefill=prefill,
        decode=decode,
        cpus_per_worker=_cpus_per_worker(config, most_ranks(config), nodes, on_gpu=gpus > 0),
        gpus_per_worker=gpus,
        accelerator_type=wanted_type,
        node_resources=_node_resources(config),
    )
    _require_room(plan, nodes)
    return plan


def most_ranks(config: ServeConfig) -> int:
    """Of all workers, were there as many of each role as there may be (`planner.max_prefill`, ...)."""
    planner = config.planner
    return sum(
        max(role.workers, most or 0) * role.tensor_parallel_size
        for one in config.of_each_model
        for role, most in ((one.prefill, planner.max_prefill), (one.decode, planner.max_decode))
    )


def next_slot(
    plan: PlacementPlan, config: ServeConfig, known: Iterable[WorkerSlot], role: Role, model: int
) -> WorkerSlot:
    """A worker that is added. known: all there were since the deployment began."""
    one = config.of_each_model[model]
    index = 1 + max((slot.index for slot in (*plan.slots, *known) if slot.role is role), default=-1)
    ranks = (one.prefill if role is Role.PREFILL else one.decode).tensor_parallel_size
    return WorkerSlot(
        worker=WorkerId(f"{role.value}-{index}"), role=role, index=index, model=model, ranks=ranks
    )


def require_room(
    plan: PlacementPlan, slots: Sequence[WorkerSlot], new: WorkerSlot, nodes: Sequence[Node]
) -> None:
    """Whether `new` fits beside `slots` on nodes that will not become more. Raises `ConfigError`."""
    _require_room(replace(plan, prefill=(), decode=(*slots, new)), nodes)


def core_slots(
    plan: PlacementPlan, node_of: Mapping[WorkerId, str], nodes: Sequence[Node]
) -> dict[WorkerId, tuple[int, ...]]:
    """The cores each CPU worker pins, as indices into the cores its process may use; () pins nothing.

    Each rank of a worker of several has its own, by its `rank_id`. Workers of one node get disjoint cores
    while there are enough, then share them in turn. GPU workers are left to the operating system.
    """
    pinned: dict[WorkerId, tuple[int, ...]] = {}
    for slot in plan.slots:
        pinned |= slot_cores(plan, slot, pinned, node_of, nodes)
    return pinned


def slot_cores(
    plan: PlacementPlan,
    slot: WorkerSlot,
    pinned: Mapping[WorkerId, tuple[int, ...]],
    node_of: Mapping[WorkerId, str],
    nodes: Sequence[Node],
) -> dict[WorkerId, tuple[int, ...]]:
    """Those of one worker's ranks, beside workers that have theirs (`pinned`): the cores of its node that
    the fewest use."""
    if plan.uses_gpus:
        return dict.fromkeys(slot_ranks(slot), ())
    here = node_of[slot.worker]
    cores = max(1, next((node.cpus for node in nodes if node.id == here), 1))
    users = [0] * cores
    for rank, taken in pinned.items():
        if node_of.get(worker_of(rank)) == here:
            for core in taken:
                users[core % cores] += 1
    found = {}
    for rank in slot_ranks(slot):
        best = sorted(range(cores), key=lambda core: (users[core], core))[: plan.cpus_per_worker]
        for core in best:
            users[core] += 1
        found[rank] = tuple(sorted(best))
    return found


def slot_ranks(slot: WorkerSlot) -> list[WorkerId]:
    """The `rank_id` of each of a worker's ranks; the only one's is the worker's."""
    return [rank_id(slot.worker, rank, slot.ranks) for rank in range(slot.ranks)]


def _slots(role: Role, wanted: Sequence[tuple[int, int]]) -> tuple[WorkerSlot, ...]:
    """The workers of one role: the first model's, then the next one's, numbered throughout. wanted: how many
    workers, and of how many ranks each, per model."""
    models = [(model, ranks) for model, (count, ranks) in enumerate(wanted) for _ in range(count)]
    return tuple(
        WorkerSlot(worker=WorkerId(f"{role.value}-{index}"), role=role, index=index, model=model, ranks=ranks)
        for index, (model, ranks) in enumerate(models)
    )


def _nodes_with(accelerator: str, nodes: Sequence[Node]) -> list[Node]:
    having = [node for node in nodes if accelerator in node.accelerator_types]
    if not having:
        found = sorted({name for node in nodes for name in node.accelerator_types})
        raise ConfigError(
            f"cluster.accelerator_type: wanted {accelerator}, the cluster has {', '.join(found) or 'none'}; "
            "remove it to take any GPU, or the CPU where there is none"
        )
    return having


def _require_no_tiers(config: ServeConfig) -> None:
    """Raise `ConfigError` for tiers below the pool of a worker of several ranks: they would keep the first
    rank's heads alone."""
    ranks = max(config.prefill.tensor_parallel_size, config.decode.tensor_parallel_size)
    if ranks > 1 and (config.cache.host_tier_gib or config.cache.disk_tier_gib):
        raise ConfigError(
            f"tensor_parallel_size is {ranks}: workers of several ranks have no host or disk tier; set "
            "cache.host_tier_gib and cache.disk_tier_gib to 0"
        )


def _gpus_per_worker(config: ServeConfig, num_ranks: int, nodes: Sequence[Node]) -> float:
    total = sum(node.gpus for node in nodes)
    asked = config.cluster.gpus_per_worker
    workers = sum(one.prefill.workers + one.decode.workers for one in config.of_each_model)
    who = f"{workers} workers" if workers == num_ranks else f"{num_ranks} ranks of {workers} workers"
    if asked is not None:
        if asked * num_ranks > total + 1e-9:
            raise ConfigError(
                f"{who} want {asked:g} GPUs each, the cluster has {total:g}; start fewer workers, or let "
                "them share: cluster.gpus_per_worker below 1"
            )
        return asked
    if total == 0:
        return 0.0
    if total >= num_ranks:
        return 1.0
    per_gpu = -(-num_ranks // int(total))
    return 1.0 / per_gpu


def _cpus_per_worker(config: ServeConfig, num_ranks: int, nodes: Sequence[Node], *, on_gpu: bool) -> int:
    if config.cluster.cpus_per_worker is not None:
        return config.cluster.cpus_per_worker
    share = max(1, sum(node.cpus for node in nodes) // num_ranks)
    if on_gpu:
        return min(share, _MAX_CPUS_PER_GPU_WORKER)
    # A worker lives on one node: a share of the whole cluster may be more than any node has.
    return min(share, max(1, max(node.cpus for node in nodes)))


def _node_resources(config: ServeConfig) -> dict[Role, str]:
    cluster = config.cluster
    wanted = {Role.PREFILL: cluster.prefill_node_resource, Role.DECODE: cluster.decode_node_resource}
    return {role: name for role, name in wanted.items() if name is not None}


def _require_room(plan: PlacementPlan, nodes: Sequence[Node]) -> None:
    """Whether whole workers fit on the nodes, first fit; a worker never spans two.

    The role that is choosier about its nodes takes them first.
    """
    left = {node.id: max(plan.fits(role, node) for role in Role) for node in nodes}
    homeless: dict[Role, list[WorkerSlot]] = {}
    for slot in sorted(plan.slots, key=lambda slot: (slot.role not in plan.node_resources, -slot.ranks)):
        fitting = [n.id for n in nodes if plan.fits(slot.role, n) and left[n.id] >= slot.ranks]
        if fitting:
            left[fitting[0]] -= slot.ranks
        else:
            homeless.setdefault(slot.role, []).append(slot)
    for role, slots in homeless.items():
        raise ConfigError(_no_room(plan, role, slots, nodes))


def _no_room(plan: PlacementPlan, role: Role, left_over: Sequence[WorkerSlot], nodes: Sequence[Node]) -> str:
    only = plan.node_resources.get(role)
    having = [node for node in nodes if only is None or only in node.resources]
    have = ", ".join(f"{node.host}: {node.cpus} CPUs, {node.gpus:g} GPUs" for node in having) or "none"
    on = "" if only is None else f" on nodes that offer {only}"
    ranks = max(slot.ranks for slot in plan.slots)
    together = "" if ranks == 1 else f" (up to {ranks} times that on one node: tensor_parallel_size)"
    return (
        f"{len(plan.slots)} workers want {plan.cpus_per_worker} CPUs and {plan.gpus_per_worker:g} GPUs each"
        f"{together}; {len(left_over)} of them fit nowhere{on} ({have}); start fewer, or lower "
        "cluster.cpus_per_worker"
    )
