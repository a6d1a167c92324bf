"""The file that describes a deployment: what is served, on which machines, and who may reach it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from pdserve.core.config import ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.core.settings import Frozen, PositiveInt

_NAME: Final = r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$"
Name = Annotated[str, Field(pattern=_NAME)]
Gib = Annotated[float, Field(gt=0)]


class Group(StrEnum):
    """Which workers a machine is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    ANY = "any"


class Machines(Frozen):
    """Machines of one kind."""

    group: Group = Group.ANY
    """Whose workers they take; `any` lets Ray choose."""
    count: PositiveInt = 1
    """How many; where `max_count` is more, how many at least."""
    max_count: PositiveInt | None = None
    """So many at most: Ray's autoscaler brings machines for workers that are added (`pdserve scale`, or
    `serve.planner.mode: active` with a budget), and takes them away again. None: always `count`."""
    cpus: PositiveInt
    """Cores of each that a pod may take."""
    memory_gib: Gib
    """Memory of each that a pod may take, shared memory included."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each."""
    shared_memory_gib: Gib = 1.0
    """/dev/shm of a pod: Ray's object store, and KV between CPU workers of one machine."""
    devices: dict[str, PositiveInt] = Field(default_factory=dict)
    """Other device plugins' resources of each pod, such as `{rdma/hca_shared_devices_a: 8}`."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes."""
    tolerations: tuple[str, ...] = ()
    """Keys of taints to put up with; `nvidia.com/gpu` is among them wherever there are GPUs."""

    @model_validator(mode="after")
    def _at_least_below_at_most(self) -> Self:
        if self.most < self.count:
            raise ValueError(f"max_count: {self.most} is less than count, {self.count}")
        return self

    @property
    def most(self) -> int:
        return self.count if self.max_count is None else self.max_count

    @property
    def scales(self) -> bool:
        return self.most > self.count


class ModelVolume(Frozen):
    """Where the checkpoints are: the same path on every machine."""

    path: str = "/models"
    """Mount point; `serve.model.model` is below it."""
    claim: Name | None = None
    """A persistent volume claim that many nodes can read."""
    host_path: str | None = None
    """Or a directory of each node."""
    node_disk: str | None = None
    """A directory of each node's own fast disk, writable by user 1000: checkpoints are copied there once per
    node and mapped from there."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.claim is None) == (self.host_path is None):
            raise ValueError("give one of claim and host_path")
        return self


class Access(Frozen):
    """Who reaches the service; everyone else is kept out by network policies."""

    client_namespaces: tuple[Name, ...] = ()
    """Namespaces whose pods may send requests; the deployment's own by default."""
    monitoring_namespace: Name = "monitoring"
    """Where Prometheus runs."""
    service_type: Annotated[str, Field(pattern=r"^(ClusterIP|LoadBalancer)$")] = "ClusterIP"
    """LoadBalancer reaches beyond the cluster: only with TLS and API keys."""


class DeploySettings(Frozen):
    """A whole deployment."""

    name: Name = "pdserve"
    """Of every object; several deployments live side by side under names of their own."""
    namespace: Name = "pdserve"
    """Made where it does not exist."""
    image: Annotated[str, Field(pattern=r"^[^\s:@]+(:\d+/[^\s:@]+)?(:[\w.-]+|@sha256:[0-9a-f]{64})$")]
    """Container image with a tag or digest; deploy/Dockerfile builds it."""
    machines: Annotated[tuple[Machines, ...], Field(min_length=1)]
    """One machine: a pod with everything. Several: a Ray cluster, made by the KubeRay operator."""
    head: Machines = Machines(cpus=4, memory_gib=16)
    """Of several machines: where the coordinator and Ray's head run; no workers."""
    models: ModelVolume | None = None
    """None: the embedded default model, fetched at the first start."""
    access: Access = Access()
    """Who may reach it."""
    secrets: dict[Name, str] = Field(default_factory=dict)
    """Kubernetes secrets by name, and where the coordinator finds their files: certificates and keys that
    `serve` names."""
    serve: ServeConfig = ServeConfig()
    """As for `pdserve serve`; addresses, ports and node groups are filled in."""

    @model_validator(mode="after")
    def _head_is_alone(self) -> Self:
        if self.head.most != 1 or self.head.gpus:
            raise ValueError("head: one machine, without GPUs")
        if self.spread and {m.group for m in self.machines} & {Group.ANY} and len(self.machines) > 1:
            raise ValueError("machines: several kinds are each for prefill or decode; `any` stands alone")
        return self

    @property
    def spread(self) -> bool:
        """Over several machines."""
        return sum(kind.most for kind in self.machines) > 1

    @property
    def scales(self) -> bool:
        """Whether machines come and go with the load."""
        return any(kind.scales for kind in self.machines)


def load_deployment(path: Path) -> DeploySettings:
    """Raises `ConfigError` with the first thing that is wrong."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: wanted keys and values, see deploy/sizes/")
    try:
        return DeploySettings.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{path}: {_where(first['loc'])}: {first['msg']}") from error


def _where(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location) or "the file"
