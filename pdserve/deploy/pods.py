"""Pods and their containers, as Kubernetes wants them described."""

from __future__ import annotations

import math
from typing import Final

from pdserve.deploy.settings import DeploySettings, Machines

Manifest = dict[str, object]
"""A Kubernetes object, or a part of one: written out, never read back."""

GRPC_PORT: Final = 50051
METRICS_PORT: Final = 9090
CONFIG_DIR: Final = "/etc/pdserve"
CACHE_DIR: Final = "/var/cache/pdserve"
NODE_DISK_DIR: Final = "/var/lib/pdserve/weights"
"""Where a node's own disk is mounted, if it is given."""
GRACE_MARGIN_S: Final = 30
"""Beyond draining, until Kubernetes kills: to stop Ray, and to flush logs."""
_USER: Final = 1000
"""Of the image: not root."""


def grace_s(deploy: DeploySettings) -> int:
    """Seconds that a pod is given to end: streams move away first."""
    settings = deploy.serve.coordinator
    return math.ceil(max(settings.drain_timeout_s, settings.grace_s)) + GRACE_MARGIN_S


def resources(machine: Machines, *, reserve_cpus: int = 0, reserve_gib: float = 0.0) -> Manifest:
    """Requests equal to limits, so that the pod is guaranteed what it asks for and cores can be its own."""
    wanted: dict[str, object] = {
        "cpu": str(machine.cpus - reserve_cpus),
        "memory": f"{math.floor((machine.memory_gib - reserve_gib) * 1024)}Mi",
    }
    if machine.gpus:
        wanted["nvidia.com/gpu"] = str(machine.gpus)
    wanted |= {name: str(count) for name, count in machine.devices.items()}
    return {"requests": wanted, "limits": dict(wanted)}


def server_container(deploy: DeploySettings, *, sized: Manifest) -> Manifest:
    """`pdserve serve`, with probes by gRPC's own health protocol."""
    probe: Manifest = {"grpc": {"port": GRPC_PORT}, "periodSeconds": 5, "timeoutSeconds": 3}
    waits_s = deploy.serve.cluster.start_timeout_s + deploy.serve.cluster.join_timeout_s
    return {
        "name": "pdserve",
        "image": deploy.image,
        "command": ["pdserve", "serve", "--config", f"{CONFIG_DIR}/serve.yaml"],
        "ports": [
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "env": [{"name": "PDSERVE_CACHE", "value": CACHE_DIR}],
        "startupProbe": {**probe, "failureThreshold": math.ceil(waits_s / 5) + 12},
        "readinessProbe": {**probe, "failureThreshold": 2},
        "livenessProbe": {**probe, "failureThreshold": 6},
        "resources": sized,
        "securityContext": _security(deploy),
        "volumeMounts": [*_mounts(deploy), {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True}]
        + [
            {"name": f"secret-{name}", "mountPath": path, "readOnly": True}
            for name, path in deploy.secrets.items()
        ],
    }


def ray_container(deploy: DeploySettings, name: str, *, sized: Manifest, drains: bool) -> Manifest:
    """A Ray node; the operator fills in how it starts.

    drains: before it ends, it tells Ray that it goes, and waits for its workers to leave.
    """
    container: Manifest = {
        "name": name,
        "image": deploy.image,
        "env": [{"name": "PDSERVE_CACHE", "value": CACHE_DIR}],
        "resources": sized,
        "securityContext": _security(deploy),
        "volumeMounts": _mounts(deploy),
    }
    if drains:
        container["lifecycle"] = {
            "preStop": {"exec": {"command": ["/bin/sh", "-c", _leave(grace_s(deploy) - GRACE_MARGIN_S)]}}
        }
    return container


def pod_spec(deploy: DeploySettings, machine: Machines, containers: list[Manifest]) -> Manifest:
    """Where the containers of one machine run, and what they share."""
    keys = dict.fromkeys((("nvidia.com/gpu",) if machine.gpus else ()) + machine.tolerations)
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace_s(deploy),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": _volumes(deploy, machine),
    }
    if machine.node_selector:
        spec["nodeSelector"] = dict(machine.node_selector)
    if keys:
        spec["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]
    return spec


def config_volume(deploy: DeploySettings) -> list[Manifest]:
    """Of a pod with the coordinator."""
    secrets: list[Manifest] = [
        {"name": f"secret-{name}", "secret": {"secretName": name, "defaultMode": 0o440}}
        for name in deploy.secrets
    ]
    return [{"name": "config", "configMap": {"name": deploy.name}}, *secrets]


def _leave(seconds: int) -> str:
    tell = (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is ending' "
        f"--deadline-remaining-seconds {seconds}"
    )
    return f"{tell}; timeout {seconds} sh -c 'while pgrep -f \"^ray::.*Actor\" >/dev/null; do sleep 1; done'"


def _security(deploy: DeploySettings) -> Manifest:
    dropped: Manifest = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if any(machine.devices for machine in deploy.machines):
        # RDMA pins the memory that it registers.
        dropped["capabilities"] = {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    return dropped


def _mounts(deploy: DeploySettings) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": CACHE_DIR},
    ]
    if deploy.models is not None:
        mounts.append({"name": "models", "mountPath": deploy.models.path, "readOnly": True})
        if deploy.models.node_disk is not None:
            mounts.append({"name": "weights", "mountPath": NODE_DISK_DIR})
    return mounts


def _volumes(deploy: DeploySettings, machine: Machines) -> list[Manifest]:
    volumes: list[Manifest] = [
        {
            "name": "shm",
            "emptyDir": {
                "medium": "Memory",
                "sizeLimit": f"{math.ceil(machine.shared_memory_gib * 1024)}Mi",
            },
        },
        {"name": "tmp", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
    ]
    if deploy.models is not None:
        source: Manifest = (
            {"persistentVolumeClaim": {"claimName": deploy.models.claim, "readOnly": True}}
            if deploy.models.claim is not None
            else {"hostPath": {"path": deploy.models.host_path, "type": "Directory"}}
        )
        volumes.append({"name": "models", **source})
        if deploy.models.node_disk is not None:
            volumes.append(
                {"name": "weights", "hostPath": {"path": deploy.models.node_disk, "type": "Directory"}}
            )
    return volumes
