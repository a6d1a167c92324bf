"""Every example configuration loads, and asks for what its comments say."""

from __future__ import annotations

import pytest
import yaml

from pdserve.cluster.placement import Node, plan_placement
from pdserve.core.config import load_config
from pdserve.core.messages import Role
from tests.support.paths import REPO

CONFIGS = sorted(path.name for path in (REPO / "deploy").glob("*.yaml") if path.name != "ray-cluster.yaml")


def test_there_is_one_for_a_cpu_one_gpu_and_a_cluster() -> None:
    assert CONFIGS == ["cpu.yaml", "h100-cluster.yaml", "one-gpu.yaml"]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_configuration_loads(name: str) -> None:
    assert load_config(REPO / "deploy" / name, {}).decode.workers >= 1


def test_the_cluster_example_fits_two_nodes_of_eight_h100() -> None:
    config = load_config(REPO / "deploy" / "h100-cluster.yaml", {})
    nodes = [Node(id=n, host=n, cpus=96, gpus=8, accelerator_types=("H100",)) for n in "ab"]
    plan = plan_placement(config, nodes)
    assert plan.bundle(Role.DECODE)["accelerator_type:H100"] == 0.001
    assert len(plan.slots) == 16


def test_the_one_gpu_example_shares_the_gpu() -> None:
    config = load_config(REPO / "deploy" / "one-gpu.yaml", {})
    plan = plan_placement(config, [Node(id="a", host="a", cpus=8, gpus=1)])
    assert plan.workers_per_gpu == 2


def test_the_ray_cluster_example_is_yaml_with_a_head_and_a_provider() -> None:
    cluster = yaml.safe_load((REPO / "deploy" / "ray-cluster.yaml").read_text())
    assert cluster["provider"]["type"] == "local"
    assert any("--head" in command for command in cluster["head_start_ray_commands"])
