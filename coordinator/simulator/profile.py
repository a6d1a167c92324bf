"""How long modelled workers take: coefficients that were measured, or derived from a model and a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from pdserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Of one worker; seconds per unit.

    prefill step = prefill_step + linear(prefill_token * tokens) + prefill_pair * pairs
    decode step  = decode_step + linear(decode_seq * sequences) + decode_context * context tokens
    mixed step   = the greater fixed part + linear(both) + pairs and context as above
    transfer     = transfer_latency + bytes / transfer_bytes_per_s

    pairs: tokens x context before them. linear(x) is the time of the layers that multiply by weights: their
    arithmetic takes x, reading the weights `weights_s`, and the two overlap as `sharpness` says.
    """

    prefill_step: float
    prefill_token: float
    prefill_pair: float
    decode_step: float
    decode_seq: float
    decode_context: float
    transfer_latency: float
    transfer_bytes_per_s: float
    kv_token_bytes: int
    num_blocks: int
    weights_s: float = 0.0
    sharpness: float = 1.0
    """p of (weights^p + arithmetic^p)^(1/p): 1 adds them up, infinity hides the lesser one completely."""
    fused: bool = True
    """A step with prompts and answers is one pass over the weights; otherwise two, one after the other."""
    block_tokens: int = 64
    max_num_seqs: int = 256
    chunk_tokens: int = 2048
    """Prompt tokens of one prefill step at most."""
    colocated_chunk_tokens: int = 512
    """The same on a worker that decodes meanwhile."""

    def prefill_s(self, tokens: float, pairs: float) -> float:
        linear_s = self._linear_s(self.prefill_token * tokens)
        return self.prefill_step + linear_s + self.prefill_pair * pairs

    def step_s(self, seqs: int, context: float) -> float:
        return self.decode_step + self._linear_s(self.decode_seq * seqs) + self.decode_context * context

    def mixed_s(self, tokens: float, pairs: float, seqs: int, context: float) -> float:
        """A step that reads `tokens` of prompts and writes a token for each of `seqs` answers."""
        if not seqs:
            return self.prefill_s(tokens, pairs)
        if not self.fused:
            return self.prefill_s(tokens, pairs) + self.step_s(seqs, context)
        linear_s = self._linear_s(self.prefill_token * tokens + self.decode_seq * seqs)
        attention_s = self.prefill_pair * pairs + self.decode_context * context
        return max(self.prefill_step, self.decode_step) + linear_s + attention_s

    def _linear_s(self, arithmetic_s: float) -> float:
        weights_s, p = self.weights_s, self.sharpness
        if not weights_s:
            return arithmetic_s
        if math.isinf(p):
            return max(weights_s, arithmetic_s)
        return float((weights_s**p + arithmetic_s**p) ** (1 / p))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Data-sheet figures, dense bf16, and the part of them that serving reaches."""

    flops: float
    bytes_per_s: float
    memory: float
    link_bytes_per_s: float
    compute_efficiency: float = 0.5
    memory_efficiency: float = 0.7


GPUS: Final[dict[str, Gpu]] = {
    "a100": Gpu(flops=312e12, bytes_per_s=2.0e12, memory=80e9, link_bytes_per_s=25e9),
    "h100": Gpu(flops=989e12, bytes_per_s=3.35e12, memory=80e9, link_bytes_per_s=50e9),
    "h200": Gpu(flops=989e12, bytes_per_s=4.8e12, memory=141e9, link_bytes_per_s=50e9),
}
"""NVIDIA's data sheets; the link is one NIC of the usual server (200 or 400 Gbit/s) per GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What the time of a dense decoder follows from."""

    params: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes_per_value: int = 2

    @classmethod
    def from_config(cls, path: Path) -> Self:
        """From a Hugging Face config.json of a dense Llama-like model. Raises `ConfigError`."""
        try:
            config: dict[str, Any] = json.loads(path.read_text())
            hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
            heads = int(config["num_attention_heads"])
            kv_heads = int(config.get("num_key_value_heads") or heads)
            head_dim = int(config.get("head_dim") or hidden // heads)
            mlp, vocab = int(config["intermediate_size"]), int(config["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
        if "num_experts" in config or "num_local_experts" in config or "n_routed_experts" in config:
            raise ConfigError(f"{path}: a mixture of experts; only dense models have an analytic profile")
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        params = layers * (attention + 3 * hidden * mlp) + 2 * vocab * hidden
        return cls(params=params, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim)

    @property
    def kv_token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value


_SPLIT_EFFICIENCY: Final = 0.93
"""Of each doubling of the GPUs of one worker: all-reduces over NVLink. An assumption."""


def analytic(
    model: ModelSize,
    gpu: Gpu,
    *,
    tensor_parallel: int = 1,
    block_tokens: int = 64,
    sharpness: float = 2.0,
) -> Profile:
    """Roofline (Williams et al., 2009): arithmetic and memory traffic, each at a fixed efficiency of its own.

    Several GPUs share all work evenly, at `_SPLIT_EFFICIENCY` for each doubling. Raises `ConfigError` when
    the weights leave no room for KV. Not modelled: kernels' shapes, all-reduces by size.
    """
    speed = tensor_parallel * _SPLIT_EFFICIENCY ** math.log2(tensor_parallel)
    flops = gpu.flops * gpu.compute_efficiency * speed
    bandwidth = gpu.bytes_per_s * gpu.memory_efficiency * speed
    weights = model.params * model.bytes_per_value
    room = gpu.memory * 0.9 * tensor_parallel - weights
    num_blocks = int(room / (model.kv_token_bytes * block_tokens))
    if num_blocks < 1:
        raise ConfigError(
            f"{weights / 1e9:.0f} GB of weights leave no room for KV on {tensor_parallel} GPU(s)"
        )
    return Profile(
        prefill_step=2e-3,
        prefill_token=2 * model.params / flops,
        prefill_pair=4 * model.layers * model.heads * model.head_dim / flops,
        decode_step=1e-3,
        decode_seq=2 * model.params / flops,
        decode_context=model.kv_token_bytes / bandwidth,
        transfer_latency=1e-3,
        transfer_bytes_per_s=gpu.link_bytes_per_s * 0.8 * tensor_parallel,
        kv_token_bytes=model.kv_token_bytes,
        num_blocks=num_blocks,
        weights_s=weights / bandwidth,
        sharpness=sharpness,
        block_tokens=block_tokens,
    )


def gpu_named(name: str) -> Gpu:
    """Raises `ConfigError` for one that is not in `GPUS`."""
    if name not in GPUS:
        raise ConfigError(f"gpu {name!r} is not known; one of {', '.join(GPUS)} is")
    return GPUS[name]
