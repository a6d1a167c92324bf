"""Which part of each weight a tensor-parallel rank holds (Megatron-LM, arXiv 1909.08053).

    q, k, v, gate, up     rows: a rank computes its heads and its part of the hidden width
    o, down               columns: every rank has a part of each sum, added up by `Ranks.sum`
    embedding, head       rows: a part of the vocabulary
    norms, router         whole on every rank

KV heads that are fewer than ranks are held by several neighbouring ranks. A rank's own `ModelConfig` has its
share of heads and widths, so that everything below (operations, KV pool) is that of a smaller model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.models.config import ModelConfig
from pdserve.models.quantization.fp8 import Fp8Weight
from pdserve.models.quantization.integers import IntWeight

Bounds = tuple[int, int]
"""First and last (exclusive) along one dimension."""


class FullSource(Protocol):
    """`pdserve.models.weights.WeightSource`."""

    @property
    def names(self) -> frozenset[str]: ...
    def require(self, name: str, shape: Sequence[int]) -> Tensor: ...


def require_shardable(config: ModelConfig, size: int) -> None:
    """Raise `ConfigError` for a number of ranks that the model cannot be divided among."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    wrong = ""
    if heads % size:
        wrong = f"its {heads} attention heads"
    elif kv_heads % size and size % kv_heads:
        wrong = f"its {kv_heads} KV heads"
    elif config.intermediate_size % size:
        wrong = f"its intermediate size of {config.intermediate_size}"
    elif config.moe is not None and config.moe.intermediate_size % size:
        wrong = f"its experts' intermediate size of {config.moe.intermediate_size}"
    elif config.vocab_size < size:
        wrong = f"its vocabulary of {config.vocab_size}"
    if wrong:
        fitting = [n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n < size and _shardable(config, n)]
        raise ConfigError(
            f"tensor_parallel_size {size}: the model cannot be divided so ({wrong}); "
            f"sizes that fit: {', '.join(map(str, fitting))}"
        )


def _shardable(config: ModelConfig, size: int) -> bool:
    try:
        require_shardable(config, size)
    except ConfigError:
        return False
    return True


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The model as one rank of `size` computes it. Raises `ConfigError`."""
    require_shardable(config, size)
    moe = config.moe
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=max(1, config.num_kv_heads // size),
        intermediate_size=config.intermediate_size // size,
        moe=None if moe is None else replace(moe, intermediate_size=moe.intermediate_size // size),
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """Part [begin, end) of dimension `dim`, which is `total` long."""

    dim: int
    begin: int
    end: int
    total: int


_QUERIES: Final = ("q_proj",)
_KEYS: Final = ("k_proj", "v_proj")
_WIDE: Final = ("gate_proj", "up_proj", "w1", "w3")
_VOCABULARY: Final = ("embed_tokens", "lm_head")
_DOWN: Final = ("down_proj", "w2")


class ShardedSource:
    """`WeightSource` of one rank: asked for the tensors of `local_config`, cut out of the whole ones."""

    def __init__(self, source: FullSource, full: ModelConfig, rank: int, size: int) -> None:
        self._source, self._full, self._rank, self._size = source, full, rank, size

    @property
    def names(self) -> frozenset[str]:
        return self._source.names

    def require(self, name: str, shape: Sequence[int]) -> Tensor:
        """The rank's part, a view where that can be. Raises as the whole source does."""
        if name.endswith("experts.gate_up_proj"):
            return self._gate_up(name, shape)
        module, is_bias = name.removesuffix(".weight").removesuffix(".bias"), name.endswith(".bias")
        cut = self._cut(module.rpartition(".")[2], shape)
        if cut is None:
            return self._source.require(name, shape)
        if is_bias and cut.dim != 0:  # added once, after the sum
            whole = self._source.require(name, shape)
            return whole if self._rank == 0 else torch.zeros_like(whole)
        return self._source.require(name, _widened(shape, cut)).narrow(
            cut.dim, cut.begin, cut.end - cut.begin
        )

    def integers(self, name: str, shape: Sequence[int]) -> IntWeight | None:
        """The rank's part of a weight stored as integers; None where it is not."""
        whole = getattr(self._source, "integers", None)
        if whole is None:
            return None
        cut = self._cut(name.removesuffix(".weight").rpartition(".")[2], shape)
        found: IntWeight | None = whole(name, shape if cut is None else _widened(shape, cut))
        if found is None or cut is None:
            return found
        return _rows(found, cut) if cut.dim == 0 else _columns(found, cut)

    def floats(self, name: str, shape: Sequence[int]) -> Fp8Weight | None:
        """The rank's part of a weight stored in FP8; None where it is not, or blocks of scales are cut."""
        whole = getattr(self._source, "floats", None)
        if whole is None:
            return None
        cut = self._cut(name.removesuffix(".weight").rpartition(".")[2], shape)
        found: Fp8Weight | None = whole(name, shape if cut is None else _widened(shape, cut))
        if found is None or cut is None:
            return found
        return _float_rows(found, cut) if cut.dim == 0 else _float_columns(found, cut)

    def _cut(self, part: str, shape: Sequence[int]) -> Cut | None:
        """Where the rank's part of a tensor lies, by the last word of its module; None: it has all of it."""
        full, rank, size = self._full, self._rank, self._size
        if part in _QUERIES:
            return _even(0, full.num_heads * full.head_dim, rank, size)
        if part == "o_proj":
            return _even(len(shape) - 1 or 1, full.num_heads * full.head_dim, rank, size)
        if part in _KEYS:
            first = rank * full.num_kv_heads // size * full.head_dim
            return Cut(0, first, first + shape[0], full.num_kv_heads * full.head_dim)
        if part in _WIDE:
            return _even(0, shape[0] * size, rank, size)
        if part in _DOWN:
            return _even(len(shape) - 1 or 1, shape[-1] * size, rank, size)
        if part in _VOCABULARY:
            return Cut(0, *vocabulary_part(full.vocab_size, rank, size), full.vocab_size)
        return None

    def _gate_up(self, name: str, shape: Sequence[int]) -> Tensor:
        """[X, 2F, E] of all experts, gate over up: a part of each half."""
        experts, both, hidden = shape
        width = both // 2
        whole = self._source.require(name, (experts, both * self._size, hidden))
        halves_X2FE = whole.view(experts, 2, width * self._size, hidden)
        part: Tensor = halves_X2FE.narrow(2, self._rank * width, width).flatten(1, 2)
        return part


def vocabulary_part(vocab_size: int, rank: int, size: int) -> Bounds:
    """Tokens whose embedding and logits are a rank's; parts differ by one at most."""
    return vocab_size * rank // size, vocab_size * (rank + 1) // size


def _even(dim: int, total: int, rank: int, size: int) -> Cut:
    return Cut(dim, total * rank // size, total * (rank + 1) // size, total)


def _widened(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    return tuple(cut.total if dim == cut.dim else length for dim, length in enumerate(shape))


def _rows(weight: IntWeight, cut: Cut) -> IntWeight:
    part = slice(cut.begin, cut.end)
    return replace(
        weight,
        codes_OI=weight.codes_OI[part],
        zeros_GO=weight.zeros_GO[:, part],
        scales_GO=weight.scales_GO[:, part],
    )


def _columns(weight: IntWeight, cut: Cut) -> IntWeight:
    inputs, groups = weight.codes_OI.shape[1], weight.scales_GO.shape[0]
    codes, group = weight.codes_OI[:, cut.begin : cut.end], inputs // groups
    if weight.group_of_I is not None:
        return replace(weight, codes_OI=codes, group_of_I=weight.group_of_I[cut.begin : cut.end])
    if cut.begin % group or cut.end % group:
        whose = torch.arange(inputs).div(group, rounding_mode="floor")
        return replace(weight, codes_OI=codes, group_of_I=whose[cut.begin : cut.end])
    of_part = slice(cut.begin // group, cut.end // group)
    return replace(
        weight, codes_OI=codes, zeros_GO=weight.zeros_GO[of_part], scales_GO=weight.scales_GO[of_part]
    )


def _float_rows(weight: Fp8Weight, cut: Cut) -> Fp8Weight:
    if cut.begin % weight.tall or (cut.end % weight.tall and cut.end != cut.total):
        weight = weight.by_output()
    scales = slice(cut.begin // weight.tall, -(-cut.end // weight.tall))
    return replace(weight, codes_OI=weight.codes_OI[cut.begin : cut.end], scales_RC=weight.scales_RC[scales])


def _float_columns(weight: Fp8Weight, cut: Cut) -> Fp8Weight | None:
    codes = weight.codes_OI[:, cut.begin : cut.end]
    if weight.scales_RC.shape[1] == 1:
        return replace(weight, codes_OI=codes)
    if cut.begin % weight.wide:
        return None
    columns = slice(cut.begin // weight.wide, -(-cut.end // weight.wide))
    return replace(weight, codes_OI=codes, scales_RC=weight.scales_RC[:, columns])
