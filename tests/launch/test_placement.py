"""Which worker gets what, and what is said when there is not enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.placement import (
    Node,
    core_slots,
    most_ranks,
    next_slot,
    node_from_resources,
    plan_placement,
    require_room,
    slot_cores,
)
from pdserve.cluster.worker_specs import worker_config
from pdserve.core.config import ClusterSettings, DecodeSettings, PrefillSettings, ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import PlannerSettings


def config(prefill: int = 1, decode: int = 1, **cluster: object) -> ServeConfig:
    return ServeConfig(
        prefill=PrefillSettings(workers=prefill),
        decode=DecodeSettings(workers=decode),
        cluster=ClusterSettings.model_validate(cluster),
    )


def node(
    cpus: int,
    gpus: float = 0,
    accelerators: tuple[str, ...] = (),
    id: str = "n0",
    resources: tuple[str, ...] = (),
) -> Node:
    return Node(
        id=id,
        host=f"host-{id}",
        cpus=cpus,
        gpus=gpus,
        accelerator_types=accelerators,
        resources=frozenset(resources),
    )


def test_two_cores_are_one_for_prefill_and_one_for_decode() -> None:
    plan = plan_placement(config(), [node(2)])
    assert plan.cpus_per_worker == 1
    assert not plan.uses_gpus
    placed = {slot.worker: "n0" for slot in plan.slots}
    assert core_slots(plan, placed, [node(2)]) == {"prefill-0": (0,), "decode-0": (1,)}


def test_more_workers_than_cores_share_them_in_turn() -> None:
    plan = plan_placement(config(2, 2, cpus_per_worker=1), [node(4)])
    two_cores = [node(2)]
    pinned = core_slots(plan, {slot.worker: "n0" for slot in plan.slots}, two_cores)
    assert [pinned[slot.worker] for slot in plan.slots] == [(0,), (1,), (0,), (1,)]


def test_workers_on_different_nodes_may_pin_the_same_core_numbers() -> None:
    nodes = [node(4, id="a"), node(4, id="b")]
    plan = plan_placement(config(1, 1, cpus_per_worker=4), nodes)
    placed = {WorkerId("prefill-0"): "a", WorkerId("decode-0"): "b"}
    assert set(core_slots(plan, placed, nodes).values()) == {(0, 1, 2, 3)}


def test_colocated_serving_has_no_prefill_group() -> None:
    plan = plan_placement(config(0, 1), [node(2)])
    assert plan.prefill == ()
    assert plan.cpus_per_worker == 2


def test_each_worker_takes_a_gpu_where_there_are_enough() -> None:
    plan = plan_placement(config(2, 2), [node(64, 4)])
    assert plan.gpus_per_worker == 1
    assert plan.bundle(Role.DECODE) == {"CPU": 8.0, "GPU": 1.0}
    assert core_slots(plan, {slot.worker: "n0" for slot in plan.slots}, [node(64, 4)]) == {
        slot.worker: () for slot in plan.slots
    }


def test_one_gpu_is_shared_and_so_is_its_memory() -> None:
    settings = config(1, 1)
    plan = plan_placement(settings, [node(16, 1)])
    assert plan.gpus_per_worker == 0.5
    shared = worker_config(settings, plan).cache.gpu_memory_utilization
    assert shared == pytest.approx(settings.cache.gpu_memory_utilization / 2)


def test_an_accelerator_type_is_asked_for_by_its_ray_resource() -> None:
    plan = plan_placement(config(accelerator_type="H100"), [node(64, 8, ("H100",)), node(64, 8, ("A100",))])
    assert plan.bundle(Role.DECODE) == {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 0.001}


def test_an_accelerator_type_that_no_node_has_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"wanted H100, the cluster has A100"):
        plan_placement(config(accelerator_type="H100"), [node(64, 8, ("A100",))])
    with pytest.raises(ConfigError, match=r"wanted H100, the cluster has none"):
        plan_placement(config(accelerator_type="H100"), [node(2)])


def test_too_many_gpus_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"4 workers want 1 GPUs each, the cluster has 2"):
        plan_placement(config(2, 2, gpus_per_worker=1), [node(64, 2)])


def test_workers_that_fit_on_no_node_are_refused_though_the_total_would_do() -> None:
    with pytest.raises(ConfigError, match=r"1 of them fit nowhere"):
        plan_placement(config(1, 1, cpus_per_worker=3), [node(4, id="a"), node(2, id="b")])


def test_a_node_is_read_from_what_ray_says() -> None:
    resources = {"CPU": 16.0, "GPU": 1.0, "accelerator_type:H200": 1.0, "memory": 1e11, "node:10.0.0.1": 1.0}
    assert node_from_resources("ab", "10.0.0.1", resources) == Node(
        id="ab",
        host="10.0.0.1",
        cpus=16,
        gpus=1.0,
        accelerator_types=("H200",),
        resources=frozenset(resources),
    )


@given(prefill=st.integers(0, 6), decode=st.integers(1, 6), cores=st.integers(1, 64))
def test_no_core_has_two_workers_while_cores_are_left(prefill: int, decode: int, cores: int) -> None:
    logical = max(cores, prefill + decode)
    plan = plan_placement(config(prefill, decode), [node(logical)])
    pinned = core_slots(plan, {slot.worker: "n0" for slot in plan.slots}, [node(logical)])
    used = [core for slots in pinned.values() for core in slots]
    assert len(used) == len(set(used))
    assert all(pinned.values())


def test_several_models_have_workers_of_their_own_numbered_throughout() -> None:
    entry = {"model": "x", "prefill": {"workers": 1}, "decode": {"workers": 2}}
    several = ServeConfig.model_validate({"models": [entry, {"model": "y", "prefill": {"workers": 0}}]})
    plan = plan_placement(several, [node(8)])
    assert [(s.worker, s.model) for s in plan.prefill] == [("prefill-0", 0)]
    assert [(s.worker, s.model) for s in plan.decode] == [("decode-0", 0), ("decode-1", 0), ("decode-2", 1)]
    assert plan.cpus_per_worker == 2


def test_small_models_share_one_gpu() -> None:
    several = ServeConfig.model_validate(
        {"models": [{"model": "x"}, {"model": "y", "prefill": {"workers": 0}}]}
    )
    plan = plan_placement(several, [node(16, 1)])
    assert plan.gpus_per_worker == pytest.approx(1 / 3)


def test_a_role_can_be_kept_to_nodes_that_offer_a_resource() -> None:
    pinned = config(8, 8, prefill_node_resource="prefill", decode_node_resource="decode")
    groups = [node(64, 8, id="p", resources=("prefill",)), node(64, 8, id="d", resources=("decode",))]
    plan = plan_placement(pinned, groups)
    assert plan.bundle(Role.PREFILL)["prefill"] == plan.bundle(Role.DECODE)["decode"] == 0.001
    assert "decode" not in plan.bundle(Role.PREFILL)


def test_a_role_without_room_on_its_own_nodes_is_refused_though_others_are_free() -> None:
    pinned = config(2, 1, prefill_node_resource="prefill", gpus_per_worker=1)
    nodes = [node(64, 1, id="p", resources=("prefill",)), node(64, 8, id="d")]
    with pytest.raises(ConfigError, match=r"1 of them fit nowhere on nodes that offer prefill"):
        plan_placement(pinned, nodes)


def test_a_role_that_goes_anywhere_leaves_the_others_nodes_to_it() -> None:
    pinned = config(1, 1, decode_node_resource="decode", gpus_per_worker=1)
    nodes = [node(64, 1, id="d", resources=("decode",)), node(64, 1, id="x")]
    assert len(plan_placement(pinned, nodes).slots) == 2


def ranked(prefill: int, decode: int, **cluster: object) -> ServeConfig:
    base = config(1, 1, **cluster)
    return base.model_copy(
        update={
            "prefill": base.prefill.model_copy(update={"tensor_parallel_size": prefill}),
            "decode": base.decode.model_copy(update={"tensor_parallel_size": decode}),
        }
    )


def test_the_ranks_of_a_worker_are_one_bundle_and_pin_cores_of_their_own() -> None:
    plan = plan_placement(ranked(1, 2, cpus_per_worker=2), [node(8)])
    assert [plan.bundle(slot.role, slot.ranks)["CPU"] for slot in plan.slots] == [2.0, 4.0]
    placed = {slot.worker: "n0" for slot in plan.slots}
    assert core_slots(plan, placed, [node(8)]) == {
        "prefill-0": (0, 1),
        "decode-0/0": (2, 3),
        "decode-0/1": (4, 5),
    }


def test_every_rank_counts_when_gpus_are_divided() -> None:
    plan = plan_placement(ranked(2, 4), [node(64, 8)])
    assert plan.gpus_per_worker == 1.0
    assert plan.bundle(Role.DECODE, 4)["GPU"] == 4.0


def test_a_worker_whose_ranks_fit_on_no_one_node_is_refused() -> None:
    nodes = [node(16, 2, id="a"), node(16, 2, id="b"), node(16, 2, id="c")]
    with pytest.raises(ConfigError, match="4 times that on one node: tensor_parallel_size"):
        plan_placement(ranked(2, 4), nodes)


def test_ranks_do_not_share_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 of a GPU: a rank .* needs one of its own"):
        plan_placement(ranked(2, 2), [node(16, 2)])


def test_workers_of_several_ranks_have_no_tiers() -> None:
    wanted = ranked(1, 2)
    cache = wanted.cache.model_copy(update={"host_tier_gib": 1.0})
    with pytest.raises(ConfigError, match="no host or disk tier"):
        plan_placement(wanted.model_copy(update={"cache": cache}), [node(8)])


def test_an_added_worker_gets_the_cores_that_the_fewest_use_and_a_name_of_its_own() -> None:
    wanted = config(1, 1, cpus_per_worker=1)
    nodes = [node(3)]
    plan = plan_placement(wanted, nodes)
    placed = {slot.worker: "n0" for slot in plan.slots}
    pinned = core_slots(plan, placed, nodes)
    added = next_slot(plan, wanted, [], Role.DECODE, 0)
    assert added.worker == "decode-1"
    require_room(plan, plan.slots, added, nodes)
    placed[added.worker] = "n0"
    assert slot_cores(plan, added, pinned, placed, nodes) == {"decode-1": (2,)}
    again = next_slot(plan, wanted, [added], Role.DECODE, 0)
    assert again.worker == "decode-2", "also when decode-1 is no more"
    with pytest.raises(ConfigError, match="1 of them fit nowhere"):
        require_room(plan, [*plan.slots, added], again, nodes)


def test_cores_are_divided_among_as_many_workers_as_there_may_be() -> None:
    growing = config(1, 1).model_copy(update={"planner": PlannerSettings(max_decode=3)})
    assert most_ranks(growing) == 4
    assert plan_placement(growing, [node(8)]).cpus_per_worker == 2
    assert plan_placement(config(1, 1), [node(8)]).cpus_per_worker == 4
