"""The few operations a decoder is made of, as the models call them. One implementation per kind of device.

Shape legend: T tokens of the step over all slices, E hidden, H query heads, K kv heads (or a token's
experts), S = H + 2K, D head_dim, F ff, V vocabulary, N blocks, L layers, B tokens of a block.

Life of an implementation: it is made with (ModelConfig, device, max_positions); the loader hands it every
weight through `linear` and `vector` and says `weights_loaded`; then the pool is allocated (with what memory
is left) and `bind_pool` is called once; from then on steps run: `plan` once per step, the rest per layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from pdserve.core.ids import BlockId
from pdserve.models.quantization.fp8 import Fp8Weight
from pdserve.models.quantization.integers import IntWeight


class Workload(Enum):
    """What a worker will mostly run: weights may be kept in one more form for small batches."""

    ANY = "any"
    PREFILL = "prefill"
    """Chunks of many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceMeta:
    """Where one sequence's new tokens lie in the step, and where its KV lies in the pool."""

    offset: int
    """Row of its first token among the T rows of the step."""
    length: int
    start: int
    """Position of its first new token in the sequence."""
    blocks: list[BlockId]
    """Covers at least start + length tokens; may be longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QKNorm:
    """Weights of Qwen3's RMSNorm over each head of q and of k, as `ModelOps.vector` returned them."""

    q_D: Tensor
    k_D: Tensor
    eps: float


class Linear(Protocol):
    """y = x @ weight.T + bias, with the weight in whatever form is fastest on this device."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """x and the result have the activation dtype of the ops that made this."""
        ...


class Experts(Protocol):
    """The gated MLPs of one mixture-of-experts layer."""

    def __call__(self, x_TE: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Sum over a token's K experts of weight * down(silu(gate x) * up x); [T, E], like x.

        weight_TK: float32. expert_TK: int64, a token's are different ones. T may be 0.
        """
        ...


class LayerStack(Protocol):
    """Whole runs of decoder layers in one call, where a device's kernels have them."""

    def layers(self, first: int, last: int, residual_TE: Tensor, plan: Any, keep_R: Tensor | None) -> Tensor:
        """Add layers [first, last) to the residual (activation dtype, contiguous) in place; write their KV.

        keep_R: int64, ascending rows to go on with once the last of these layers has written its KV, or None
        for all. Returns the residual of the rows that go on.
        """
        ...

    def logits(self, residual_RE: Tensor) -> Tensor:
        """The head of the final norm: float32 [R, V]."""
        ...


class ModelOps(Protocol):
    """Device operations. Steps are called under `torch.inference_mode`.

    Activations that the model passes around (embeddings, residual, results of every method) have dtype
    `activation_dtype`; the pool has the dtype of the cache group and may differ.
    """

    @property
    def activation_dtype(self) -> torch.dtype: ...

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        """Prepare a projection. The weight is in the model's dtype, on the CPU or on the device, and may be a
        read-only view of a mapped file; it may be kept or repacked, never written to."""
        ...

    def head(self, weight_VE: Tensor) -> Linear:
        """`linear` for the projection to logits: its results are not rounded to less than they are summed in,
        where the device allows it."""
        ...

    def integer_linear(self, weight: IntWeight, bias_O: Tensor | None) -> Linear:
        """`linear` for a weight that is stored as small integers."""
        ...

    def fp8_linear(self, weight: Fp8Weight, bias_O: Tensor | None) -> Linear:
        """`linear` for a weight that is stored in FP8."""
        ...

    def experts(self, weights: Iterable[tuple[Tensor, Tensor]]) -> Experts:
        """Prepare a mixture from every expert's (gate over up [2F, E], down [E, F]), as `linear` does."""
        ...

    def vector(self, weight: Tensor) -> Tensor:
        """A norm weight in the form that `rms_norm` wants."""
        ...

    def weights_loaded(self) -> None:
        """Every weight has been given: whatever is chosen by measuring may be chosen now."""
        ...

    def stack(self, layers: Sequence[Any], final_norm_E: Tensor, head: Linear) -> LayerStack | None:
        """The model's layers as one, or None where they are computed operation by operation. Called once,
        after `weights_loaded`; layers: its `DecoderLayer`s in order."""
        ...

    def bind_pool(self, pool_NL2KBD: Tensor) -> None:
        """Give the KV pool whose blocks the plans will name. Called once."""
        ...

    def plan(self, slices: Sequence[SliceMeta]) -> Any:
        """Prepare a step (index tensors, rotary factors, splits); reused by every layer of that step,
        opaque to the model. Slices are in row order and cover the T rows without gaps."""
        ...

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """`residual += x` in place, then the norm of it."""
        ...

    def rope_and_write(self, qkv_TSD: Tensor, layer: int, plan: Any, qk_norm: QKNorm | None) -> Tensor:
        """Norm (if given) and rotate q and k, write k and v of the new tokens into the pool.

        qkv_TSD is contiguous: H query heads, then K key heads, then K value heads per token; it may be
        overwritten. Rotation pairs dimension i with i + D/2 (Hugging Face's `rotate_half`).
        Returns rotated q [T, H, D], which may be a view of qkv.
        """
        ...

    def attention(self, q_THD: Tensor, layer: int, plan: Any) -> Tensor:
        """Causal attention of the new tokens over the pool (new KV is written already); [T, H, D].

        The scale is D ** -0.5. With a sliding window W a token at position p sees (p - W, p].
        """
        ...

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) * up of a fused projection, gate first; [T, F]."""
        ...

    def layers_done(self) -> None:
        """Return when the KV of all layers issued so far is in the pool, readable by other devices (on a GPU:
        wait for an event). Called before a transfer may read it."""
        ...
