"""From a model directory and settings to an engine that can run steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from pdserve.core.config import CacheSettings, DType, KVCacheDType, ModelSettings
from pdserve.core.errors import ConfigError
from pdserve.core.layout import PROTOCOL_VERSION, CacheGroup, Fingerprint, GroupLayout, blocks_for
from pdserve.engine.heap import keep_heap_between_steps
from pdserve.engine.kv_pool import TORCH_DTYPES, KVPool
from pdserve.engine.runner import ModelRunner
from pdserve.engine.sampler import Sampler
from pdserve.models.checkpoint import Checkpoint
from pdserve.models.config import ModelConfig
from pdserve.models.cpu import make_cpu_ops
from pdserve.models.hf_config import read_config
from pdserve.models.llama import LlamaModel
from pdserve.models.local_copy import local_copy
from pdserve.models.ops import ModelOps, Workload
from pdserve.models.quantization.view import DequantisedView
from pdserve.models.ranks import Ranks
from pdserve.models.sharding import local_config
from pdserve.models.weights import DummySource, WeightSource, load_llama

GIB: Final = 2**30
CPU_POOL_BYTES: Final = GIB
"""KV pool on a CPU when nothing is configured."""
KV_DTYPES: Final = {KVCacheDType.AUTO: None, KVCacheDType.FP8_E4M3: "float8_e4m3fn"}
GPU_STEP_BYTES: Final = GIB
"""Left free on a GPU for the activations of a step."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a worker runs: the model over its pool, and the sampler."""

    runner: ModelRunner
    sampler: Sampler
    config: ModelConfig
    fingerprint: Fingerprint
    num_blocks: int
    block_tokens: int


def build_engine(
    model_dir: Path,
    model: ModelSettings,
    cache: CacheSettings,
    *,
    device: str,
    num_threads: int | None,
    progress: Callable[[float, str], None] | None = None,
    workload: Workload = Workload.ANY,
    ranks: Ranks | None = None,
) -> Engine:
    """Load the model, allocate the KV pool with what memory is left, and say what peers must agree on.

    device: "cpu" or as torch names a GPU. num_threads: of this process's torch, None leaves it.
    progress: called with a fraction in [0, 1] and words, on this thread.
    workload: on a CPU, a prefill worker keeps its weights once; others keep a second form for small batches.
    ranks: processes that compute the model together with this one (tensor parallelism), all of which build
    their engine at the same time; each has its part of the weights and of the KV heads. None: alone.
    Raises `CheckpointError` for weights that do not fit the config, `ConfigError` for settings that cannot
    work.
    """
    say = progress or _silent
    target = torch.device(device)
    _prepare(target, num_threads)
    if model.local_dir is not None:
        model_dir = local_copy(model_dir, Path(model.local_dir), lambda words: say(0.0, words))
    say(0.0, "reading the configuration")
    config = read_config(model_dir)
    config = replace(
        config,
        dtype=config.dtype if model.dtype is DType.AUTO else model.dtype.value,
        kv_cache_dtype=KV_DTYPES[cache.kv_cache_dtype],
    )
    wanted_len = _wanted_len(config, model)
    weights, digest = _load(model_dir, model, config, target, wanted_len, workload, say, ranks)
    say(0.97, "allocating the KV cache")
    layout = GroupLayout(group=_cache_group(config, ranks), block_tokens=cache.block_size)
    num_blocks = _num_blocks(layout, cache, target)
    if ranks is not None:
        num_blocks = ranks.smallest(num_blocks)
    max_model_len = _fitting_len(wanted_len, num_blocks, layout, model)
    pool = KVPool(layout, num_blocks, target)
    runner = ModelRunner(weights, (pool,), max_model_len=max_model_len, model_digest=digest, device=target)
    sampler = Sampler(config.vocab_size, target)
    if target.type == "cpu":
        keep_heap_between_steps()
    else:
        # Ranks compute a step together, eagerly; a prefill worker has no decode steps worth recording.
        alone = ranks is None and workload is Workload.ANY
        sampler = _prepare_steps(runner, model.cuda_graph_sizes if alone else (), say)
    say(1.0, "engine ready")
    return Engine(
        runner=runner,
        sampler=sampler,
        config=config,
        fingerprint=_fingerprint(digest, layout, ranks),
        num_blocks=num_blocks,
        block_tokens=cache.block_size,
    )


def _fingerprint(digest: str, layout: GroupLayout, ranks: Ranks | None) -> Fingerprint:
    return Fingerprint(
        protocol=PROTOCOL_VERSION,
        model=digest,
        layouts=(layout,),
        tp_rank=0 if ranks is None else ranks.rank,
        tp_size=1 if ranks is None else ranks.size,
    )


def _prepare_steps(runner: ModelRunner, graph_sizes: tuple[int, ...], say: Progress) -> Sampler:
    """On a GPU: record decode steps, and sample there."""
    # Only a host with a GPU has Triton.
    from pdserve.engine.build_gpu import decode_graphs
    from pdserve.engine.decode_graphs import cuda_capture
    from pdserve.engine.device_sampler import DeviceSampler

    def told(done: int, total: int, rows: int) -> None:
        say(0.98 + 0.02 * done / total, f"recording decode steps of {rows} sequences ({done + 1} of {total})")

    if graph_sizes:
        runner.use_graphs(decode_graphs(runner, graph_sizes, cuda_capture(runner.device), told))
    return DeviceSampler(runner.config.vocab_size, runner.device)


def _silent(fraction: float, words: str) -> None:
    pass


def _prepare(device: torch.device, num_threads: int | None) -> None:
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    if torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]:
        raise ConfigError(
            "expandable_segments is on in PyTorch's CUDA allocator: KV transfers would be hundreds of "
            "times slower; remove it from PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF)"
        )


def _load(
    model_dir: Path,
    model: ModelSettings,
    config: ModelConfig,
    device: torch.device,
    max_positions: int,
    workload: Workload,
    progress: Progress,
    ranks: Ranks | None,
) -> tuple[LlamaModel, str]:
    dtype = TORCH_DTYPES[config.dtype]
    own = config if ranks is None else local_config(config, ranks.size)
    ops = _make_ops(own, device, max_positions, workload, progress)
    # The pool is allocated after the weights: the last few percent are its.
    scaled = lambda fraction, words: progress(0.02 + 0.94 * fraction, words)  # noqa: E731
    if model.load_format == "dummy":
        source = DummySource(dtype)
        digest = hashlib.sha256(b"dummy" + (model_dir / "config.json").read_bytes()).hexdigest()[:32]
        weights = load_llama(config, source, ops, dtype=dtype, device=device, progress=scaled, ranks=ranks)
        return weights, digest
    with Checkpoint.open(model_dir) as checkpoint:
        stored: WeightSource = checkpoint
        if config.quantization is not None:
            stored = DequantisedView(checkpoint, config.quantization, dtype)
        weights = load_llama(config, stored, ops, dtype=dtype, device=device, progress=scaled, ranks=ranks)
        return weights, checkpoint.digest


def _make_ops(
    config: ModelConfig, device: torch.device, max_positions: int, workload: Workload, progress: Progress
) -> ModelOps:
    if device.type == "cpu":
        return make_cpu_ops(config, device, max_positions, workload, lambda words: progress(0.01, words))
    # Only a host with a GPU has Triton.
    from pdserve.models.ops_triton import TritonOps

    ops: ModelOps = TritonOps(config, device, max_positions)
    return ops


def _wanted_len(config: ModelConfig, model: ModelSettings) -> int:
    if model.max_model_len is None:
        return config.max_position
    if model.max_model_len > config.max_position:
        raise ConfigError(
            f"model.max_model_len is {model.max_model_len}, the checkpoint's context is {config.max_position}"
        )
    return model.max_model_len


def _fitting_len(wanted_len: int, num_blocks: int, layout: GroupLayout, model: ModelSettings) -> int:
    """The context, cut to what the pool holds; an error where the user asked for more."""
    capacity = num_blocks * layout.block_tokens
    if wanted_len <= capacity:
        return wanted_len
    if model.max_model_len is not None:
        need = blocks_for(wanted_len, layout.block_tokens)
        raise ConfigError(
            f"model.max_model_len {wanted_len} needs {need} KV blocks "
            f"({need * layout.block_bytes / GIB:.2f} GiB), the pool has {num_blocks}; "
            "raise cache.memory_gib or lower max_model_len"
        )
    return capacity


def _cache_group(config: ModelConfig, ranks: Ranks | None) -> CacheGroup:
    own = config if ranks is None else local_config(config, ranks.size)
    return CacheGroup(
        name="attention",
        num_layers=config.num_layers,
        num_kv_heads=own.num_kv_heads,
        total_kv_heads=None if ranks is None else config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=config.kv_dtype,
        sliding_window=config.sliding_window,
    )


def _num_blocks(layout: GroupLayout, cache: CacheSettings, device: torch.device) -> int:
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.memory_gib is not None:
        return int(cache.memory_gib * GIB) // layout.block_bytes
    if device.type != "cuda":
        return CPU_POOL_BYTES // layout.block_bytes
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = int(total * cache.gpu_memory_utilization) - (total - free) - GPU_STEP_BYTES
    if left < layout.block_bytes:
        raise ConfigError(
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB of {device} are free after loading the weights; "
            f"gpu_memory_utilization {cache.gpu_memory_utilization} leaves nothing for the KV cache"
        )
    return left // layout.block_bytes
