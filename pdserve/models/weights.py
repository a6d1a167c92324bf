"""From a checkpoint's tensors to a `LlamaModel`: names, shapes, fused projections, tied heads, dummies.

Tensor names are those of Hugging Face's Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.models.config import ModelConfig, MoeConfig
from pdserve.models.layers import DecoderLayer
from pdserve.models.llama import LlamaModel
from pdserve.models.mlp import DenseMlp, Mlp, MoeMlp
from pdserve.models.moe_weights import expert_weights, router_name
from pdserve.models.ops import Linear, ModelOps, QKNorm
from pdserve.models.quantization.fp8 import Fp8Weight, stacked_floats
from pdserve.models.quantization.integers import IntWeight, stacked
from pdserve.models.quantization.view import DequantisedView
from pdserve.models.ranks import Ranks
from pdserve.models.sharding import ShardedSource, local_config, vocabulary_part
from pdserve.models.tensor_parallel import (
    GatheredHead,
    SharedRouter,
    SharedVocabulary,
    SummedExperts,
    SummedLinear,
)

DUMMY_NUMBERS: Final = 2**20
PLAIN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Progress = Callable[[float, str], None]
"""(fraction in [0, 1], words for what is going on)."""


class WeightSource(Protocol):
    """A checkpoint, or something that makes one up."""

    @property
    def names(self) -> frozenset[str]:
        """Tensors whose name tells one spelling of a checkpoint from another."""
        ...

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

    @property
    def names(self) -> frozenset[str]:
        return frozenset()

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
    ranks: Ranks | None = None,
) -> LlamaModel:
    """Read every weight once, in file order of layers, converted to `dtype`. Raises `CheckpointError`s.

    ranks: who computes the model together with this process, which then keeps its part of the weights. ops
    are those of its `local_config`; config is the whole model's.
    """
    vocabulary, vocab_rows = None, config.vocab_size
    if ranks is not None:
        first_token, last_token = vocabulary_part(config.vocab_size, ranks.rank, ranks.size)
        vocabulary, vocab_rows = SharedVocabulary(config.vocab_size, ranks), last_token - first_token
        source = ShardedSource(source, config, ranks.rank, ranks.size)
        config = local_config(config, ranks.size)
    loader = _Loader(config, source, ops, dtype, ranks)
    embedding = loader.tensor("model.embed_tokens.weight", (vocab_rows, config.hidden_size)).to(device)
    layers = []
    for index in range(config.num_layers):
        progress(index / (config.num_layers + 1), f"loading layer {index + 1} of {config.num_layers}")
        layers.append(loader.layer(index))
    progress(config.num_layers / (config.num_layers + 1), "loading the head")
    head = embedding
    if not config.tie_word_embeddings:
        head = loader.tensor("lm_head.weight", (vocab_rows, config.hidden_size))
    final_norm = loader.norm("model.norm.weight", config.hidden_size)
    logits = ops.head(head)
    progress(0.99, "choosing matrix products")
    ops.weights_loaded()
    # Between sums the ranks meet: a run of layers cannot be one call.
    stack = ops.stack(layers, final_norm, logits) if vocabulary is None else None
    return LlamaModel(
        config=config,
        ops=ops,
        embedding_VE=embedding,
        layers=tuple(layers),
        final_norm_E=final_norm,
        head=logits if vocabulary is None else GatheredHead(logits, vocabulary),
        stack=stack,
        vocabulary=vocabulary,
    )


class _Loader:
    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        ops: ModelOps,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
    ) -> None:
        self._config, self._source, self._ops, self._dtype = config, source, ops, dtype
        self._ranks = ranks

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        return self._stored(name, shape).to(self._dtype)

    def _stored(self, name: str, shape: Sequence[int]) -> Tensor:
        found = self._source.require(name, shape)
        if found.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"tensor {name!r} is stored as {found.dtype}, config.json does not say how it is quantised"
            )
        return found

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
            out=self._summed([(attention + "o_proj", c.hidden_size)], queries, biased=c.o_bias),
            post_norm_E=self.norm(prefix + "post_attention_layernorm.weight", c.hidden_size),
            mlp=self._mlp(prefix, index),
        )

    def _mlp(self, prefix: str, index: int) -> Mlp:
        c = self._config
        if c.moe is not None and index in c.moe.layers:
            return self._mixture(prefix, c.moe)
        gate_up = [(f"{prefix}mlp.{part}_proj", c.intermediate_size) for part in ("gate", "up")]
        down = [(prefix + "mlp.down_proj", c.hidden_size)]
        return DenseMlp(
            self._fused(gate_up, c.hidden_size, biased=c.mlp_bias),
            self._summed(down, c.intermediate_size, biased=c.mlp_bias),
        )

    def _mixture(self, prefix: str, moe: MoeConfig) -> MoeMlp:
        names, hidden = self._source.names, self._config.hidden_size
        weight = self.tensor(router_name(names, prefix), (moe.num_experts, hidden))
        router: Linear = self._ops.linear(weight, None)
        experts = self._ops.experts(expert_weights(self._stored, names, prefix, moe, hidden, self._dtype))
        if self._ranks is not None:
            router = SharedRouter(router, self._ranks, moe.num_experts)
            experts = SummedExperts(experts, self._ranks)
        return MoeMlp(
            router=router,
            experts=experts,
            experts_per_token=moe.experts_per_token,
            normalised=moe.normalised,
        )

    def _qk_norm(self, attention: str) -> QKNorm:
        size = self._config.head_dim
        return QKNorm(
            q_D=self.norm(attention + "q_norm.weight", size),
            k_D=self.norm(attention + "k_norm.weight", size),
            eps=self._config.rms_norm_eps,
        )

    def _summed(self, parts: Sequence[tuple[str, int]], inputs: int, *, biased: bool) -> Linear:
        """`_fused`, of inputs that are divided among the ranks."""
        part = self._fused(parts, inputs, biased=biased)
        return part if self._ranks is None else SummedLinear(part, self._ranks)

    def _fused(self, parts: Sequence[tuple[str, int]], inputs: int, *, biased: bool) -> Linear:
        """One projection made of several, stacked along its outputs."""
        bias = None
        if biased:
            bias = torch.cat([self.tensor(f"{name}.bias", (outputs,)) for name, outputs in parts])
        integers = self._integers(parts, inputs)
        if integers is not None:
            return self._ops.integer_linear(integers, bias)
        floats = self._floats(parts, inputs)
        if floats is not None:
            return self._ops.fp8_linear(floats, bias)
        weights = [self.tensor(f"{name}.weight", (outputs, inputs)) for name, outputs in parts]
        return self._ops.linear(weights[0] if len(weights) == 1 else torch.cat(weights), bias)

    def _integers(self, parts: Sequence[tuple[str, int]], inputs: int) -> IntWeight | None:
        """The projection's weight in integers, where all of it is stored so."""
        if not isinstance(self._source, (DequantisedView, ShardedSource)):
            return None
        found = [self._source.integers(f"{name}.weight", (outputs, inputs)) for name, outputs in parts]
        whole = [part for part in found if part is not None]
        return stacked(whole) if len(whole) == len(found) else None

    def _floats(self, parts: Sequence[tuple[str, int]], inputs: int) -> Fp8Weight | None:
        """The projection's weight in FP8, where all of it is stored so."""
        if not isinstance(self._source, (DequantisedView, ShardedSource)):
            return None
        found = [self._source.floats(f"{name}.weight", (outputs, inputs)) for name, outputs in parts]
        whole = [part for part in found if part is not None]
        return stacked_floats(whole) if len(whole) == len(found) else None
