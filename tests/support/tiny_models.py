"""Random tiny checkpoints of every family served, written by transformers, which is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB = 160
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_QWEN3_EXPERTS: dict[str, Any] = {
    "num_experts": 10,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "head_dim": 16,
}


def _qwen_window() -> PretrainedConfig:
    return Qwen2Config(**_COMMON, use_sliding_window=True, sliding_window=20, max_window_layers=0)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2_no_gqa": lambda: LlamaConfig(**{**_COMMON, "num_key_value_heads": 6}, tie_word_embeddings=False),
    "llama32_tied_llama3_rope": lambda: LlamaConfig(
        **_COMMON, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE
    ),
    "llama_linear_rope": lambda: LlamaConfig(
        **_COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama_biased_wide_head": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral_sliding_window": lambda: MistralConfig(**_COMMON, sliding_window=20),
    "mistral_no_window": lambda: MistralConfig(**_COMMON, sliding_window=None),
    "qwen2_qkv_bias": lambda: Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen2_sliding_window": _qwen_window,
    "four_bit_sizes": lambda: Qwen2Config(
        **{**_COMMON, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    ),
    "mixtral": lambda: MixtralConfig(**_COMMON, num_local_experts=6, num_experts_per_tok=2),
    "mixtral_sliding_window": lambda: MixtralConfig(**_COMMON, num_local_experts=4, sliding_window=20),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_QWEN3_EXPERTS, norm_topk_prob=True),
    "qwen3_moe_some_layers_dense": lambda: Qwen3MoeConfig(
        **{**_COMMON, "num_hidden_layers": 5},
        **_QWEN3_EXPERTS,
        norm_topk_prob=False,
        mlp_only_layers=[3],
        decoder_sparse_step=2,
        attention_bias=True,
    ),
    "qwen3_qk_norm": lambda: Qwen3Config(**_COMMON, head_dim=16, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class TinyModel:
    path: Path
    oracle: PreTrainedModel

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), vocab]."""
        with torch.inference_mode():
            return self.oracle(torch.tensor([tokens]), use_cache=False).logits[0].float()


def make_tiny_model(family: str, folder: Path, seed: int = 0) -> TinyModel:
    """Norms and biases are random too, so that a weight put in the wrong place shows."""
    return make_tiny_model_of(FAMILIES[family](), folder, seed)


def make_tiny_model_of(config: PretrainedConfig, folder: Path, seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    oracle = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    oracle.save_pretrained(folder)
    return TinyModel(folder, oracle)
