"""The objects of a deployment: its configuration, where it runs, how it is reached, and who may reach it.

One machine becomes a Deployment of one pod that starts a Ray of its own. Several become a RayCluster of the
KubeRay operator: a head with the coordinator beside it, and one worker group per kind of machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

import yaml

from pdserve.cluster.placement import Node, PlacementPlan, plan_placement
from pdserve.core.config import ModelSettings, ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.deploy.pods import (
    GRPC_PORT,
    METRICS_PORT,
    NODE_DISK_DIR,
    Manifest,
    config_volume,
    pod_spec,
    ray_container,
    resources,
    server_container,
)
from pdserve.deploy.settings import DeploySettings, Group, Machines

_INSTANCE: Final = "pdserve/instance"
_COMPONENT: Final = "pdserve/component"
"""Labels of our own: the operator sets the customary ones of its pods itself."""
_RAY_CPUS, _RAY_GIB = 1, 2.0
"""Of the head's machine: Ray itself, the rest is the coordinator's."""
_JOIN_TIMEOUT_S: Final = 1800.0
"""Nodes with GPUs take a while to appear."""
_DASHBOARD_PORT: Final = 8265


def resolved(deploy: DeploySettings) -> tuple[ServeConfig, PlacementPlan]:
    """What `pdserve serve` will be told there, and which worker goes where.

    Raises `ConfigError` when the machines have no room for the workers.
    """
    serve = deploy.serve
    cluster: dict[str, object] = {"linger_s": 0.0}
    if deploy.spread:
        cluster |= {"address": "auto", "join_timeout_s": serve.cluster.join_timeout_s or _JOIN_TIMEOUT_S}
        for group in (Group.PREFILL, Group.DECODE):
            if any(machine.group is group for machine in deploy.machines):
                cluster[f"{group.value}_node_resource"] = _resource(deploy, group)
    config = serve.model_copy(
        update={
            "coordinator": serve.coordinator.model_copy(
                update={"host": "0.0.0.0", "port": GRPC_PORT, "metrics_port": METRICS_PORT}
            ),
            "cluster": serve.cluster.model_copy(update=cluster),
            "model": _with_node_disk(deploy, serve.model),
        }
    )
    return config, plan_placement(config, _nodes(deploy, config))


def _with_node_disk(deploy: DeploySettings, model: ModelSettings) -> ModelSettings:
    if deploy.models is None or deploy.models.node_disk is None:
        return model
    return model.model_copy(update={"local_dir": NODE_DISK_DIR})


def render(deploy: DeploySettings) -> list[Manifest]:
    """Every object, in the order to apply them. Raises `ConfigError` as `resolved` does."""
    config, _ = resolved(deploy)
    runs = _ray_cluster(deploy) if deploy.spread else _one_pod(deploy)
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": deploy.namespace}},
        _object(deploy, "v1", "ConfigMap", data={"serve.yaml": _serve_yaml(config)}),
        runs,
        _service(deploy),
        *_network_policies(deploy),
        *_disruption_budgets(deploy),
    ]


def to_yaml(objects: Sequence[Manifest]) -> str:
    """One document per object, without anchors."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Plain.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=Plain, sort_keys=False, width=110, explicit_start=True)


def _serve_yaml(config: ServeConfig) -> str:
    said = config.model_dump(mode="json", exclude_unset=False, exclude_defaults=True)
    return yaml.safe_dump(said, sort_keys=False)


def _resource(deploy: DeploySettings, group: Group) -> str:
    """The custom Ray resource that the machines of a group offer."""
    return f"{deploy.name}-{group.value}"


def _nodes(deploy: DeploySettings, config: ServeConfig) -> list[Node]:
    """The machines as Ray will count them."""
    nodes: list[Node] = []
    accelerator = config.cluster.accelerator_type
    for machine in deploy.machines:
        for _ in range(machine.count):
            name = f"{machine.group.value} {len(nodes)}"
            types = (accelerator,) if accelerator is not None and machine.gpus else ()
            offers = frozenset({_resource(deploy, machine.group)})
            nodes.append(
                Node(
                    id=name,
                    host=name,
                    cpus=machine.cpus,
                    gpus=machine.gpus,
                    accelerator_types=types,
                    resources=offers,
                )
            )
    return nodes


def _labels(deploy: DeploySettings, component: str) -> dict[str, str]:
    return {_INSTANCE: deploy.name, _COMPONENT: component}


def _mine(deploy: DeploySettings, component: str | None = None) -> Manifest:
    """A selector of this deployment's pods."""
    return {"matchLabels": {_INSTANCE: deploy.name} if component is None else _labels(deploy, component)}


def _object(
    deploy: DeploySettings, version: str, kind: str, *, suffix: str = "", **content: object
) -> Manifest:
    labels = {"app.kubernetes.io/name": "pdserve", "app.kubernetes.io/instance": deploy.name}
    metadata = {"name": deploy.name + suffix, "namespace": deploy.namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def _one_pod(deploy: DeploySettings) -> Manifest:
    machine = deploy.machines[0]
    spec = pod_spec(deploy, machine, [server_container(deploy, sized=resources(machine))])
    spec["volumes"] = [*_list(spec["volumes"]), *config_volume(deploy)]
    labels = _labels(deploy, "server")
    return _object(
        deploy,
        "apps/v1",
        "Deployment",
        spec={
            "replicas": 1,
            # Two would want the same GPUs: the old one goes first.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    )


def _ray_cluster(deploy: DeploySettings) -> Manifest:
    return _object(
        deploy,
        "ray.io/v1",
        "RayCluster",
        spec={
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            **({"enableInTreeAutoscaling": True} if deploy.scales else {}),
            "headGroupSpec": {
                # No workers on the head: they are for machines of their groups.
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "127.0.0.1"},
                "template": {"metadata": {"labels": _labels(deploy, "server")}, "spec": _head(deploy)},
            },
            "workerGroupSpecs": [
                _worker_group(deploy, machine, index) for index, machine in enumerate(deploy.machines)
            ],
        },
    )


def _head(deploy: DeploySettings) -> Manifest:
    head = deploy.head
    if head.cpus <= _RAY_CPUS or head.memory_gib <= _RAY_GIB:
        raise ConfigError(f"head: wants more than {_RAY_CPUS} core and {_RAY_GIB:g} GiB")
    ray = head.model_copy(update={"cpus": _RAY_CPUS, "memory_gib": _RAY_GIB})
    server = server_container(deploy, sized=resources(head, reserve_cpus=_RAY_CPUS, reserve_gib=_RAY_GIB))
    # KubeRay gives its token to Ray's own container alone.
    token: Manifest = {"secretKeyRef": {"name": deploy.name, "key": "auth_token"}}
    server["env"] = [
        *_list(server["env"]),
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
    ]
    containers = [ray_container(deploy, "ray-head", sized=resources(ray), drains=False), server]
    spec = pod_spec(deploy, head, containers)
    spec["shareProcessNamespace"] = True
    if deploy.scales:
        # KubeRay puts Ray's autoscaler into this pod, with an account that may change this cluster's size.
        spec["automountServiceAccountToken"] = True
    spec["volumes"] = [*_list(spec["volumes"]), *config_volume(deploy)]
    return spec


def _worker_group(deploy: DeploySettings, machine: Machines, index: int) -> Manifest:
    offers = '"{\\"' + _resource(deploy, machine.group) + '\\": 1}"'
    container = ray_container(deploy, "ray-worker", sized=resources(machine), drains=True)
    component = f"{machine.group.value}-worker"
    return {
        "groupName": f"{machine.group.value}-{index}",
        "replicas": machine.count,
        "minReplicas": machine.count,
        "maxReplicas": machine.most,
        "rayStartParams": {"resources": offers},
        "template": {
            "metadata": {"labels": _labels(deploy, component)},
            "spec": pod_spec(deploy, machine, [container]),
        },
    }


def _service(deploy: DeploySettings) -> Manifest:
    return _object(
        deploy,
        "v1",
        "Service",
        spec={
            "type": deploy.access.service_type,
            "selector": _labels(deploy, "server"),
            "ports": [
                {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"},
                {"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics"},
            ],
        },
    )


def _network_policies(deploy: DeploySettings) -> list[Manifest]:
    """Requests from clients, scrapes from monitoring, everything between our own pods, and nothing else.

    Ray's ports take orders from whoever reaches them: they are open among our own pods only.
    """
    clients = deploy.access.client_namespaces or (deploy.namespace,)
    requests = {"from": [_namespace(name) for name in clients], "ports": [_tcp(GRPC_PORT)]}
    scrapes = {"from": [_namespace(deploy.access.monitoring_namespace)], "ports": [_tcp(METRICS_PORT)]}
    among_us = {"from": [{"podSelector": _mine(deploy)}]}
    policies = [
        _object(
            deploy,
            "networking.k8s.io/v1",
            "NetworkPolicy",
            suffix="-server",
            spec={
                "podSelector": _mine(deploy, "server"),
                "policyTypes": ["Ingress"],
                "ingress": [requests, scrapes],
            },
        )
    ]
    if deploy.spread:
        operator = {"from": [{"namespaceSelector": {}, "podSelector": _operator()}], "ports": _ray_ports()}
        policies.append(
            _object(
                deploy,
                "networking.k8s.io/v1",
                "NetworkPolicy",
                suffix="-cluster",
                spec={
                    "podSelector": _mine(deploy),
                    "policyTypes": ["Ingress"],
                    "ingress": [among_us, operator],
                },
            )
        )
    return policies


def _operator() -> Manifest:
    return {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}


def _ray_ports() -> list[Manifest]:
    """What the operator asks a head for."""
    return [_tcp(_DASHBOARD_PORT)]


def _disruption_budgets(deploy: DeploySettings) -> list[Manifest]:
    """Maintenance takes one machine at a time, and never the coordinator without being asked twice."""
    budgets = [_budget(deploy, "server", "-server", 0)]
    groups = sorted({machine.group.value for machine in deploy.machines}) if deploy.spread else []
    return budgets + [_budget(deploy, f"{group}-worker", f"-{group}", 1) for group in groups]


def _budget(deploy: DeploySettings, component: str, suffix: str, at_most: int) -> Manifest:
    return _object(
        deploy,
        "policy/v1",
        "PodDisruptionBudget",
        suffix=suffix,
        spec={"maxUnavailable": at_most, "selector": _mine(deploy, component)},
    )


def _namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(port: int) -> Manifest:
    return {"protocol": "TCP", "port": port}


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value
