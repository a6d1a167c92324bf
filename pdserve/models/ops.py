"""The few operations a decoder is made of, as the models call them. One implementation per kind of device.

Shape legend: T tokens of the step over all slices, E hidden, H query heads, K kv heads, D head_dim, F ff.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdserve.core.ids import BlockId


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceMeta:
    """Where one sequence's new tokens lie in the step, and where its KV lies in the pool."""

    offset: int
    """Row of its first token among the T rows of the step."""
    length: int
    start: int
    """Position of its first new token in the sequence."""
    blocks: list[BlockId]


class AttentionPlan(Protocol):
    """Whatever a device prepares once per step and reuses in every layer (index tensors, splits)."""


class ModelOps(Protocol):
    """Device operations. All are called under `torch.inference_mode`."""

    def plan(self, slices: Sequence[SliceMeta]) -> AttentionPlan:
        """Prepare a step; slices are in row order and cover the T rows without gaps."""
        ...

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """`residual += x` in place, then the norm of it."""
        ...

    def rope_and_write(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer: int, plan: AttentionPlan
    ) -> Tensor:
        """Rotate q and k, write k and v of the new tokens into the pool; returns rotated q [T, H, D]."""
        ...

    def attention(self, q_THD: Tensor, layer: int, plan: AttentionPlan) -> Tensor:
        """Causal attention of the new tokens over the pool (new KV is written already); [T, H, D]."""
        ...

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(gate) * up of a fused projection; [T, F]."""
        ...
