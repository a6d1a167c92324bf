"""From a checkpoint's tensors to a `LlamaModel`: names, shapes, fused projections, tied heads, dummies.

Tensor names are those of Hugging Face's Llama, Mistral, Qwen2 and Qwen3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.models.config import ModelConfig
from pdserve.models.layers import DecoderLayer
from pdserve.models.llama import LlamaModel
from pdserve.models.ops import Linear, ModelOps, QKNorm

DUMMY_NUMBERS: Final = 2**20
PLAIN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Progress = Callable[[float, str], None]
"""(fraction in [0, 1], words for what is going on)."""


class WeightSource(Protocol):
    """A checkpoint, or something that makes one up."""

    def require(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor; raises `MissingTensor` or `ShapeMismatch`."""
        ...


class DummySource:
    """Random weights of the right shape, the same in every process that asks for the same tensors in order.

    Matrices are cut from one million normal numbers, over and over: drawing billions would take minutes.
    """

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._pattern = torch.randn(DUMMY_NUMBERS, generator=self._generator).mul_(0.02).to(dtype)

    def require(self, name: str, shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:
            fill = 0.0 if name.endswith("bias") else 1.0
            return torch.full(tuple(shape), fill, dtype=self._dtype)
        shift = int(torch.randint(DUMMY_NUMBERS, (), generator=self._generator))
        count = math.prod(shape)
        repeats = -(-count // DUMMY_NUMBERS)
        return self._pattern.roll(shift).repeat(repeats)[:count].view(tuple(shape))


def load_llama(
    config: ModelConfig,
    source: WeightSource,
    ops: ModelOps,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> LlamaModel:
    """Read every weight once, in file order of layers, converted to `dtype`. Raises `CheckpointError`s."""
    loader = _Loader(config, source, ops, dtype)
    embedding = loader.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)).to(device)
    layers = []
    for index in range(config.num_layers):
        progress(index / (config.num_layers + 1), f"loading layer {index + 1} of {config.num_layers}")
        layers.append(loader.layer(index))
    progress(config.num_layers / (config.num_layers + 1), "loading the head")
    head = embedding
    if not config.tie_word_embeddings:
        head = loader.tensor("lm_head.weight", (config.vocab_size, config.hidden_size))
    model = LlamaModel(
        config=config,
        ops=ops,
        embedding_VE=embedding,
        layers=tuple(layers),
        final_norm_E=loader.norm("model.norm.weight", config.hidden_size),
        head=ops.linear(head, None),
    )
    progress(0.99, "choosing matrix products")
    ops.weights_loaded()
    return model


class _Loader:
    def __init__(self, config: ModelConfig, source: WeightSource, ops: ModelOps, dtype: torch.dtype) -> None:
        self._config, self._source, self._ops, self._dtype = config, source, ops, dtype

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        found = self._source.require(name, shape)
        if found.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"tensor {name!r} is stored as {found.dtype}, config.json does not say how it is quantised"
            )
        return found.to(self._dtype)

    def norm(self, name: str, size: int) -> Tensor:
        return self._ops.vector(self.tensor(name, (size,)))

    def layer(self, index: int) -> DecoderLayer:
        c = self._config
        prefix = f"model.layers.{index}."
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention = prefix + "self_attn."
        return DecoderLayer(
            index=index,
            input_norm_E=self.norm(prefix + "input_layernorm.weight", c.hidden_size),
            qkv=self._fused(
                [(attention + "q_proj", queries), (attention + "k_proj", keys), (attention + "v_proj", keys)],
                c.hidden_size,
                biased=c.qkv_bias,
            ),
            qk_norm=self._qk_norm(attention) if c.qk_norm else None,
            out=self._fused([(attention + "o_proj", c.hidden_size)], queries, biased=c.o_bias),
            post_norm_E=self.norm(prefix + "post_attention_layernorm.weight", c.hidden_size),
            gate_up=self._fused(
                [
                    (prefix + "mlp.gate_proj", c.intermediate_size),
                    (prefix + "mlp.up_proj", c.intermediate_size),
                ],
                c.hidden_size,
                biased=c.mlp_bias,
            ),
            down=self._fused(
                [(prefix + "mlp.down_proj", c.hidden_size)], c.intermediate_size, biased=c.mlp_bias
            ),
        )

    def _qk_norm(self, attention: str) -> QKNorm:
        size = self._config.head_dim
        return QKNorm(
            q_D=self.norm(attention + "q_norm.weight", size),
            k_D=self.norm(attention + "k_norm.weight", size),
            eps=self._config.rms_norm_eps,
        )

    def _fused(self, parts: Sequence[tuple[str, int]], inputs: int, *, biased: bool) -> Linear:
        """One projection made of several, stacked along its outputs."""
        weights = [self.tensor(f"{name}.weight", (outputs, inputs)) for name, outputs in parts]
        bias = None
        if biased:
            bias = torch.cat([self.tensor(f"{name}.bias", (outputs,)) for name, outputs in parts])
        return self._ops.linear(weights[0] if len(weights) == 1 else torch.cat(weights), bias)
