"""What `pdserve deploy render` writes is valid, agrees with itself, and is what `pdserve serve` reads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # comes with Ray; it has no stubs
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from pdserve.cli.app import app
from pdserve.core.config import load_config
from pdserve.core.errors import ConfigError
from pdserve.deploy.render import render, resolved, to_yaml
from pdserve.deploy.settings import DeploySettings, load_deployment
from tests.support.paths import REPO

SIZES = sorted(path.stem for path in (REPO / "deploy" / "sizes").glob("*.yaml"))
KUBERNETES = "1.33"


@functools.cache
def objects_of_size(name: str) -> list[dict[str, Any]]:
    return objects_of(size(name))


def objects_of(deploy: DeploySettings) -> list[dict[str, Any]]:
    """As Kubernetes would read them."""
    return list(yaml.safe_load_all(to_yaml(render(deploy))))


def size(name: str) -> DeploySettings:
    return load_deployment(REPO / "deploy" / "sizes" / f"{name}.yaml")


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [entry for entry in objects if entry["kind"] == kind]
    return found


def pod_templates(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for entry in objects:
        if entry["kind"] == "Deployment":
            found.append(entry["spec"]["template"])
        if entry["kind"] == "RayCluster":
            groups = [entry["spec"]["headGroupSpec"], *entry["spec"]["workerGroupSpecs"]]
            found += [group["template"] for group in groups]
    return found


def small(**changes: object) -> DeploySettings:
    return DeploySettings.model_validate(
        {"image": "pdserve:0.1.0", "machines": [{"cpus": 4, "memory_gib": 8}], **changes}
    )


def test_there_are_three_sizes() -> None:
    assert SIZES == ["cpu-box", "h100-cluster", "h100-node"]


@pytest.mark.parametrize("name", SIZES)
def test_every_object_of_a_size_is_valid_kubernetes(name: str) -> None:
    objects = objects_of_size(name)
    for entry in objects:
        if entry["kind"] != "RayCluster":
            kubernetes_validate.validate(entry, KUBERNETES, strict=True)
    for template in pod_templates(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


START_PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": START_PARAMETERS, "template": {"type": "object", "required": ["spec"]}}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["token", "disabled"]}},
        },
        "enableInTreeAutoscaling": {"type": "boolean"},
        "headGroupSpec": {
            "type": "object",
            "additionalProperties": False,
            "required": list(GROUP),
            "properties": GROUP,
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["groupName", "minReplicas", "maxReplicas", *GROUP],
                "properties": GROUP
                | {"groupName": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}}
                | {"replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT, "numOfHosts": COUNT},
            },
        },
    },
}
"""Fields of KubeRay's API ray.io/v1 that we write, with their types there; templates are Kubernetes' own."""


@pytest.mark.parametrize("name", SIZES)
def test_a_ray_cluster_has_the_fields_of_kuberays_api_and_no_other(name: str) -> None:
    for entry in objects_of_size(name):
        if entry["kind"] == "RayCluster":
            assert entry["apiVersion"] == "ray.io/v1"
            jsonschema.validate(entry["spec"], RAY_CLUSTER)
            for group in entry["spec"]["workerGroupSpecs"]:
                assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", SIZES)
def test_the_configuration_in_it_is_what_serve_reads(name: str, tmp_path: Path) -> None:
    deploy = size(name)
    file = tmp_path / "serve.yaml"
    file.write_text(one(objects_of(deploy), "ConfigMap")["data"]["serve.yaml"])
    assert load_config(file, {}) == resolved(deploy)[0]


@pytest.mark.parametrize("name", SIZES)
def test_every_selector_finds_pods_of_this_deployment(name: str) -> None:
    objects = objects_of_size(name)
    pods = [template["metadata"]["labels"] for template in pod_templates(objects)]
    selectors = [one(objects, "Service")["spec"]["selector"]]
    selectors += [
        entry["spec"]["podSelector"]["matchLabels"] for entry in objects if entry["kind"] == "NetworkPolicy"
    ]
    selectors += [
        entry["spec"]["selector"]["matchLabels"]
        for entry in objects
        if entry["kind"] == "PodDisruptionBudget"
    ]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods), selector


@pytest.mark.parametrize("name", SIZES)
def test_every_mount_has_its_volume(name: str) -> None:
    for template in pod_templates(objects_of_size(name)):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_a_cluster_keeps_prefill_and_decode_workers_to_machines_of_their_own() -> None:
    deploy = size("h100-cluster")
    config, plan = resolved(deploy)
    groups = one(objects_of(deploy), "RayCluster")["spec"]["workerGroupSpecs"]
    assert [(group["groupName"], group["replicas"]) for group in groups] == [
        ("prefill-0", 4),
        ("decode-1", 8),
    ]
    # The operator writes the value into a shell command, so it carries quotes of its own.
    offered = [yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"])) for group in groups]
    wanted = [config.cluster.prefill_node_resource, config.cluster.decode_node_resource]
    assert [list(offer) for offer in offered] == [[name] for name in wanted]
    assert (len(plan.prefill), len(plan.decode)) == (32, 64)


def test_machines_that_may_become_more_are_left_to_rays_autoscaler() -> None:
    fixed = size("h100-cluster")
    prefill, decode = fixed.machines
    growing = fixed.model_copy(
        update={"machines": (prefill, decode.model_copy(update={"max_count": decode.count + 4}))}
    )
    spec = one(objects_of(growing), "RayCluster")["spec"]
    jsonschema.validate(spec, RAY_CLUSTER)
    assert spec["enableInTreeAutoscaling"] is True
    bounds = [(group["minReplicas"], group["maxReplicas"]) for group in spec["workerGroupSpecs"]]
    assert bounds == [(4, 4), (8, 12)]
    # The autoscaler asks Kubernetes, from the head and from nowhere else.
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    asks = [pod["template"]["spec"]["automountServiceAccountToken"] for pod in pods]
    assert asks == [True, False, False]
    still = one(objects_of(fixed), "RayCluster")["spec"]
    assert "enableInTreeAutoscaling" not in still
    assert still["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_a_pod_that_ends_is_given_longer_than_its_streams_need_to_move() -> None:
    deploy = size("h100-cluster")
    for template in pod_templates(objects_of(deploy)):
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > deploy.serve.coordinator.drain_timeout_s


def test_nothing_runs_as_root_and_nothing_may_become_it() -> None:
    for template in pod_templates(objects_of_size("h100-cluster")):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_only_named_namespaces_reach_the_service() -> None:
    policies = [
        e["spec"] for e in objects_of_size("h100-cluster") if e["metadata"]["name"] == "pdserve-server"
    ]
    ingress = next(spec["ingress"] for spec in policies if "ingress" in spec)
    names = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in ingress[0]["from"]
    ]
    assert names == ["search", "chat"]


def test_secrets_are_mounted_for_the_coordinator_alone() -> None:
    deploy = size("h100-cluster").model_copy(update={"secrets": {"pdserve-tls": "/etc/pdserve-tls"}})
    head, *workers = pod_templates(objects_of(deploy))
    mounted = [mount["mountPath"] for c in head["spec"]["containers"] for mount in c["volumeMounts"]]
    assert mounted.count("/etc/pdserve-tls") == 1
    assert "pdserve-tls" not in yaml.safe_dump(workers)


def test_more_workers_than_machines_have_room_for_are_refused() -> None:
    deploy = small(serve={"decode": {"workers": 3}, "cluster": {"cpus_per_worker": 2}})
    with pytest.raises(ConfigError, match="2 of them fit nowhere"):
        render(deploy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("image: pdserve\nmachines: [{cpus: 1, memory_gib: 1}]", "image"),
        ("image: pdserve:1\nmachines: []", "machines"),
        ("image: pdserve:1\nmachines: [{cpus: 1, memory_gib: 1}]\nservce: {}", "servce"),
        ("image: pdserve:1\nmachines: [{cpus: 1, memory_gib: 1}]\nmodels: {}", "claim and host_path"),
        ("image: pdserve:1\nmachines: [{cpus: 1, memory_gib: 1, count: 3, max_count: 2}]", "max_count: 2"),
        ("image: pdserve:1\nname: Not_A_Name\nmachines: [{cpus: 1, memory_gib: 1}]", "name"),
        ("just text", "keys and values"),
        ("a: [", "expected"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load_deployment(file)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_writes_a_file_and_says_what_goes_where(tmp_path: Path) -> None:
    out = tmp_path / "all.yaml"
    done = CliRunner().invoke(
        app, ["deploy", "render", str(REPO / "deploy" / "sizes" / "h100-node.yaml"), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "2 prefill + 6 decode workers on 1 machine" in done.output
    assert one(list(yaml.safe_load_all(out.read_text())), "Deployment")["spec"]["replicas"] == 1


def ranked(prefill: int, decode: int) -> DeploySettings:
    """One machine of eight GPUs with a prefill worker of two ranks and `decode` workers of four."""
    return small(
        machines=[{"cpus": 64, "memory_gib": 500, "gpus": 8}],
        serve={
            "prefill": {"workers": prefill, "tensor_parallel_size": 2},
            "decode": {"workers": decode, "tensor_parallel_size": 4},
            "cluster": {"gpus_per_worker": 1},
        },
    )


def test_ranks_count_as_gpus_of_one_machine() -> None:
    deploy = ranked(2, 1)
    _, plan = resolved(deploy)
    assert sum(plan.bundle(slot.role, slot.ranks)["GPU"] for slot in plan.slots) == 8
    pod = one(objects_of(deploy), "Deployment")["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    told = yaml.safe_load(one(objects_of(deploy), "ConfigMap")["data"]["serve.yaml"])
    assert told["decode"]["tensor_parallel_size"] == 4


def test_more_ranks_than_gpus_are_refused_before_anything_is_applied() -> None:
    with pytest.raises(ConfigError, match="10 ranks of 3 workers want 1 GPUs each"):
        render(ranked(1, 2))
