"""What pdserve needs to know of a model, read from a Hugging Face config.json (or GGUF metadata)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pdserve.models.quantization.scheme import Scheme


class RopeKind(StrEnum):
    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    """Frequency-dependent scaling of Llama 3.1 (its config.json `rope_scaling`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Layers whose MLP is a mixture: a router sends every token to a few of many small MLPs."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """Of one expert."""
    normalised: bool
    """Whether the weights of a token's chosen experts are scaled to sum to one."""
    layers: tuple[int, ...]
    """Which layers are mixtures; the others have a plain MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, RoPE, grouped-query attention, gated SiLU MLP."""

    architecture: str
    """As config.json names it, such as `LlamaForCausalLM`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    """Qwen2: biases on q, k and v."""
    qk_norm: bool = False
    """Qwen3: RMSNorm of each head of q and k before RoPE."""
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    """Tokens a layer can look back, all layers alike (Mistral v0.1); None is full attention."""
    moe: MoeConfig | None = None
    dtype: str = "bfloat16"
    """The checkpoint's own: bfloat16, float16 or float32."""
    kv_cache_dtype: str | None = None
    """Of the KV cache, where not `dtype`: float8_e4m3fn."""
    quantization: Scheme | None = None
    """How the weights are stored, where not in a type of their own."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_dtype(self) -> str:
        return self.kv_cache_dtype or self.dtype
