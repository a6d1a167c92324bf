"""The configuration tree: parsed once from YAML and flags, frozen, handed down in slices.

A snapshot test lists every knob. Derived values are fields of a `Resolved...` object, never mutation.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from pdserve.core.errors import ConfigError
from pdserve.core.operation_settings import CostSettings, LoggingSettings, PlannerSettings, TracingSettings
from pdserve.core.security_settings import SecuritySettings
from pdserve.core.settings import Frozen, PositiveInt, Seconds, off
from pdserve.core.sla_settings import STANDARD_CLASSES, Classes, SlaClassSettings, TenantSettings
from pdserve.core.speculative_settings import SpeculativeSettings
from pdserve.core.transfer_settings import TransferSettings


class DType(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class RoutingPolicy(StrEnum):
    POWER_OF_TWO = "power_of_two"
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    PREFIX_AWARE = "prefix_aware"
    SLA = "sla"


class LocalPrefill(StrEnum):
    """Whether decode workers read prompts themselves where there are prefill workers."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


class WholeOnPrefill(StrEnum):
    """Whether prefill workers keep requests whole, and write the answers too."""

    AUTO = "auto"
    NEVER = "never"


class Admission(StrEnum):
    """Which requests are refused at once because no placement can serve them in time."""

    OFF = "off"
    DEADLINE = "deadline"
    TTFT = "ttft"
    TARGETS = "targets"


class ModelSettings(Frozen):
    model: str = "SmolLM2-135M-Instruct"
    """A Hugging Face checkpoint directory, a .gguf file, or a name that `pdserve models list` shows."""
    served_model_name: str | tuple[str, ...] | None = None
    """Name that clients use, or several: answers and metrics have the first. The directory's by default."""
    dtype: DType = DType.AUTO
    """auto: the checkpoint's own."""
    max_model_len: PositiveInt | None = None
    """Longest prompt + answer in tokens; the checkpoint's own by default."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the right shape, for measuring."""
    local_dir: str | None = None
    """A directory on each machine's own fast disk: the first worker there copies the checkpoint into it, all
    map it from there. For checkpoints on a shared or slow filesystem; nothing: they are mapped in place."""

    cuda_graph_sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 24, 32, 48, 64)
    """On a GPU, decode steps of up to these many sequences are recorded as CUDA graphs when a worker starts;
    larger steps run eagerly. Empty: all do."""

    @property
    def served_names(self) -> tuple[str, ...]:
        """Empty: that of the model's directory."""
        names = self.served_model_name
        return () if names is None else (names,) if isinstance(names, str) else names


class KVCacheDType(StrEnum):
    """What numbers of the KV cache are stored as."""

    AUTO = "auto"
    FP8_E4M3 = "fp8_e4m3"


class CacheSettings(Frozen):
    block_size: PositiveInt = 64
    """Tokens per KV block."""
    kv_cache_dtype: KVCacheDType = KVCacheDType.AUTO
    """auto: the model's dtype. fp8_e4m3: 8 bits a number, so half of the memory and of every transfer, and
    answers that differ a little; workers of one deployment must have the same."""
    num_blocks: PositiveInt | None = None
    """Blocks per worker; derived from memory_gib when not given. Each rank of a worker has as many, of its
    own heads."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """KV pool per worker; of one rank, where tensor_parallel_size is above 1. Default: 1 GiB on a CPU, what
    is left of gpu_memory_utilization on a GPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory for weights, activations and KV; divided where workers share a GPU."""
    enable_prefix_caching: bool = True
    """Keep finished blocks and reuse them for prompts that begin alike."""
    host_tier_gib: Annotated[float, Field(ge=0)] = 0.0
    """Host memory per worker for prefix blocks that the pool has no room for. 0: none."""
    disk_tier_gib: Annotated[float, Field(ge=0)] = 0.0
    """Disk per worker for what the host tier has no room for; survives a restart. 0: none."""
    disk_tier_path: str | None = None
    """Where: a directory on a local disk. Each worker has its own in it."""


class PrefillSettings(Frozen):
    workers: Annotated[int, Field(ge=0)] = 1
    """0: decode workers read prompts themselves."""
    max_num_batched_tokens: PositiveInt = 512
    """Token budget of one step; a longer prompt is read in chunks of at most this."""
    max_num_seqs: PositiveInt = 32
    """Prompts read in one step at most."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks of a worker: processes on one node, each with a GPU (or cores) of its own, that hold a part of
    the weights and of the KV cache and compute every step together. It divides the attention heads."""


class DecodeSettings(Frozen):
    workers: PositiveInt = 1
    """Processes that write answers."""
    standby: Annotated[int, Field(ge=0)] = 0
    """Of these, so many stand by: with the model loaded and without requests, until another worker of the
    model, of either role, is lost; they give its place back when it has started again."""
    max_num_seqs: PositiveInt = 64
    """Answers written at the same time on one worker at most."""
    max_num_batched_tokens: PositiveInt = 512
    """Token budget of a step in which the worker also reads prompts itself."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks of a worker, as `prefill.tensor_parallel_size`; the two may differ."""

    @model_validator(mode="after")
    def _somebody_writes(self) -> Self:
        if self.standby >= self.workers:
            raise ValueError("standby: fewer than workers, or nobody writes answers")
        return self


class CoordinatorSettings(Frozen):
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """gRPC; 0 picks a free port."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Prometheus; 0 picks a free port, shown at start."""
    console_host: str = "127.0.0.1"
    """Address of the web page that shows the service; beyond this machine only with API keys."""
    console_port: Annotated[int, Field(ge=0, le=65535)] | None = 0
    """Of that page; 0 picks a free port, shown at start; nothing (null): no page."""
    policy: RoutingPolicy | Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = RoutingPolicy.POWER_OF_TWO
    """How a request's workers are chosen: by name, or `module:Class` for a policy of your own."""
    local_prefill: LocalPrefill = LocalPrefill.AUTO
    """Whether a decode worker reads a prompt itself although there are prefill workers. auto: where it is
    predicted to be cheaper, such as while prompts queue and the decode worker has little to do."""
    whole_on_prefill: WholeOnPrefill = WholeOnPrefill.AUTO
    """Whether a prefill worker keeps a request whole, prompt and answer. auto: where that is predicted to be
    cheaper, such as a short answer while decode workers have much to write; and where none has room."""
    fetch_prefixes: bool = True
    """What a worker lacks of a prompt's beginning is pushed to it by one that has it cached, before the
    request starts, where that is predicted to take less than half as long as reading it again."""
    admission: Annotated[Admission, BeforeValidator(off)] = Admission.DEADLINE
    """With policy sla: refuse at once, with RESOURCE_EXHAUSTED and when to come back, a request whose first
    token cannot come before its deadline (ttft: or its TTFT target), whoever serves it. targets: as ttft,
    and refuse one whose TPOT target nobody can meet, and let one wait that would make others miss theirs."""
    max_queued_requests: PositiveInt = 1024
    """More than this many waiting are refused with RESOURCE_EXHAUSTED, the least urgent first."""
    queue_ttl_s: Seconds | None = None
    """A request that has waited this long without having begun is refused; nothing: until its deadline."""
    preemption: bool = True
    """A request that would miss its TTFT target for want of room takes that of a less urgent one whose
    class is preemptible."""
    max_preemptions: Annotated[int, Field(ge=0)] = 3
    """A request is interrupted this often at most."""
    classes: Classes = Field(default_factory=lambda: dict(STANDARD_CLASSES))
    """Service classes that requests name with sla_class, by name. Those here are added to `interactive`
    (priority 0) and `batch` (priority 10, preemptible), or replace them."""
    default_class: str | None = None
    """Class of a request that names none."""
    tenants: dict[str, TenantSettings] = Field(default_factory=dict)
    """Limits and weights, by the tenant that requests name; `*` is for each of those that are not listed."""
    record: str | None = None
    """A file for everything that routing goes by, prompts' tokens included; `pdserve replay` checks with it
    that the same inputs give the same decisions. It grows for as long as the coordinator runs."""
    max_message_mib: PositiveInt = 16
    """A larger gRPC message is refused."""
    max_attempts: PositiveInt = 3
    """A request whose workers die this often fails."""
    heartbeat_timeout_s: Seconds = 5.0
    """A worker silent for this long is dead, even if its process lives."""
    step_timeout_s: Seconds = 300.0
    """A worker whose step lasts this long hangs, though it gives signs of life: it is replaced."""
    drain_timeout_s: Seconds = 120.0
    """Requests of a drained decode worker that found no room elsewhere by then start over elsewhere."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """Running requests get this long to finish when the service is told to stop (SIGTERM, Ctrl-C)."""
    default_max_tokens: PositiveInt = 256
    """Longest answer of a request that does not say."""
    default_timeout_s: Seconds = 600.0
    """Deadline of a request whose client set none."""
    explain_last: Annotated[int, Field(ge=0)] = 512
    """How many requests `pdserve explain` remembers, running ones included; a few kilobytes each."""

    @model_validator(mode="after")
    def _known_default_class(self) -> Self:
        if self.default_class is not None and self.default_class not in self.classes:
            known = ", ".join(sorted(self.classes))
            raise ValueError(f"default_class: {self.default_class!r} is none of the classes ({known})")
        return self


NodeResource = Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")] | None


class ClusterSettings(Frozen):
    address: str = "local"
    """`local` starts Ray on this machine; `auto` or host:port joins a running cluster."""
    accelerator_type: str | None = None
    """As Ray names it (H100, H200, A100); None takes any GPU, or the CPU where there is none."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """Of one rank of a worker, where tensor_parallel_size is above 1. None: 1 where the cluster has enough
    GPUs, a share where it has fewer, 0 where it has none."""
    prefill_node_resource: NodeResource = None
    """Prefill workers go only to nodes that offer this custom Ray resource, as started with
    `ray start --resources='{"prefill": 1}'`: a group of machines of their own. Any node by default."""
    decode_node_resource: NodeResource = None
    """The same for decode workers."""
    cpus_per_worker: PositiveInt | None = None
    """Of one rank of a worker, where tensor_parallel_size is above 1. None: the machine's cores divided among
    all ranks."""
    lend_cores: bool = True
    """CPU workers of one machine: a prefill worker also computes on the cores of decode workers that have
    nothing to do."""
    dashboard: bool = True
    """Ray's dashboard, on loopback, for a cluster that we start."""
    dashboard_port: Annotated[int, Field(ge=0, le=65535)] = 8265
    """The next free one where it is taken."""
    heartbeat_s: Seconds = 0.5
    """How often a worker tells the coordinator how it is."""
    profile_s: Annotated[float, Field(ge=0, le=10)] = 0.8
    """How long a worker measures its own speed before it takes requests, so that predictions are right from
    the first one; its engine is warm then. 0: not at all."""
    start_timeout_s: Seconds = 300.0
    """A worker that has not loaded its model by then has failed."""
    join_timeout_s: Annotated[float, Field(ge=0)] = 0.0
    """How long to wait, on a cluster that we join, until it has nodes enough for all workers. 0: refuse at
    once."""
    linger_s: Annotated[float, Field(ge=0)] = 60.0
    """How long workers outlive a `pdserve serve` that was killed, so that the next one with the same settings
    takes them over without loading anything. 0: they end with it."""


class ModelEntry(ModelSettings):
    """One of several models behind one endpoint. What it leaves open is as in the sections above."""

    cache: CacheSettings = CacheSettings()
    """As the section; memory_gib and gpu_memory_utilization say how models share a device."""
    prefill: PrefillSettings = PrefillSettings()
    """As the section: its own workers."""
    decode: DecodeSettings = DecodeSettings()
    """As the section: its own workers."""
    speculative: SpeculativeSettings = SpeculativeSettings()
    """As the section."""
    classes: dict[str, SlaClassSettings] = Field(default_factory=dict)
    """What service classes mean for this model; the rest of a class is as in coordinator.classes."""
    default_class: str | None = None
    """Class of a request that names none; coordinator.default_class by default."""


_OF_EACH_MODEL: Final = ("cache", "prefill", "decode", "speculative")
_SHARED_MODEL_KEYS: Final = ("dtype", "max_model_len", "load_format", "local_dir")


class ServeConfig(Frozen):
    """Everything `pdserve serve` can be told. Flags override the file."""

    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    prefill: PrefillSettings = PrefillSettings()
    decode: DecodeSettings = DecodeSettings()
    speculative: SpeculativeSettings = SpeculativeSettings()
    transfer: TransferSettings = TransferSettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    cluster: ClusterSettings = ClusterSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()
    cost: CostSettings = CostSettings()
    planner: PlannerSettings = PlannerSettings()
    security: SecuritySettings = SecuritySettings()
    seed: int = 0
    """Seeds routing and dummy weights; request seeds are their own."""
    models: tuple[ModelEntry, ...] = ()
    """Several models instead of one, each with workers of its own. The sections `model` (but for its name),
    `cache`, `prefill`, `decode` and `speculative` are what an entry begins with."""

    @model_validator(mode="before")
    @classmethod
    def _share_sections(cls, data: Any) -> Any:
        entries = data.get("models") if isinstance(data, dict) else None
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
            return data
        shared = {name: _mapping(data.get(name)) for name in ("model", *_OF_EACH_MODEL)}
        merged = [_laid_over(shared, entry) for entry in entries]
        if not merged:
            return data
        first = {key: value for key, value in merged[0].items() if key in ModelSettings.model_fields}
        named = {"model", "served_model_name"} & shared["model"].keys()
        if any(shared["model"][key] != first.get(key) for key in named):
            raise ValueError("give model.model (or --model) or models, not both")
        return {**data, "models": merged, "model": {**shared["model"], **first}}

    @model_validator(mode="after")
    def _known_default_classes(self) -> Self:
        for index, entry in enumerate(self.models):
            known = self.coordinator.classes.keys() | entry.classes.keys()
            if entry.default_class is not None and entry.default_class not in known:
                names = ", ".join(sorted(known))
                raise ValueError(f"models.{index}.default_class: {entry.default_class!r} is none of {names}")
        return self

    @property
    def of_each_model(self) -> tuple[ServeConfig, ...]:
        """For each model a configuration as if it were the only one."""
        if not self.models:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "models": (),
                    "model": ModelSettings(**{k: getattr(entry, k) for k in ModelSettings.model_fields}),
                    **{name: getattr(entry, name) for name in _OF_EACH_MODEL},
                }
            )
            for entry in self.models
        )


def _mapping(section: object) -> dict[str, Any]:
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return dict(section) if isinstance(section, dict) else {}


def _laid_over(shared: dict[str, dict[str, Any]], entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `models`, with what the sections say where it says nothing."""
    merged = {key: shared["model"][key] for key in _SHARED_MODEL_KEYS if key in shared["model"]} | entry
    for name in _OF_EACH_MODEL:
        own = entry.get(name)
        if own is None or isinstance(own, dict):
            merged[name] = {**shared[name], **(own or {})}
    return merged


def load_config(path: Path | None, overrides: dict[str, dict[str, Any]]) -> ServeConfig:
    """Read YAML and lay flag overrides (section -> field -> value) on top. Raises `ConfigError`."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {path}: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"--config {path}: wanted a mapping, found {type(tree).__name__}")
    for section, fields in overrides.items():
        for key, value in fields.items():
            _set(tree, (section, *key.split(".")), value)
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from error


def _set(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    """Put `value` at `path`, making the mappings on the way; what the file has is left as it is."""
    for index, part in enumerate(path[:-1]):
        inner = tree.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(path[: index + 1])}: wanted a mapping, found {inner!r}")
        tree[part] = inner = dict(inner or {})
        tree = inner
    tree[path[-1]] = value


def _one_line(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where, what = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        # Of a whole section it is said what is wrong; all of it would be no help.
        got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        parts.append(f"{where}: {what}{got}" if where else f"{what}{got}")
    return "; ".join(parts)
