"""One decoder layer of the Llama family, over `ModelOps`.

Shape legend: T tokens of the step, E hidden, H query heads, K kv heads, S = H + 2K, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdserve.models.config import ModelConfig
from pdserve.models.ops import Linear, ModelOps, QKNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. q, k and v are one projection, and so are gate and up."""

    index: int
    input_norm_E: Tensor
    qkv: Linear
    qk_norm: QKNorm | None
    out: Linear
    post_norm_E: Tensor
    gate_up: Linear
    down: Linear

    def forward(
        self, x_TE: Tensor, residual_TE: Tensor, ops: ModelOps, config: ModelConfig, plan: Any
    ) -> Tensor:
        """Add x to the residual, in place, and run the layer; returns what the next layer adds."""
        eps = config.rms_norm_eps
        hidden = ops.add_rms_norm(x_TE, residual_TE, self.input_norm_E, eps)
        return self._after_norm(hidden, residual_TE, ops, config, plan)

    def forward_first(self, residual_TE: Tensor, ops: ModelOps, config: ModelConfig, plan: Any) -> Tensor:
        """As `forward` where there is nothing to add yet: the residual is the embedding."""
        hidden = ops.rms_norm(residual_TE, self.input_norm_E, config.rms_norm_eps)
        return self._after_norm(hidden, residual_TE, ops, config, plan)

    def _after_norm(
        self, hidden_TE: Tensor, residual_TE: Tensor, ops: ModelOps, config: ModelConfig, plan: Any
    ) -> Tensor:
        rows = hidden_TE.shape[0]
        heads = config.num_heads + 2 * config.num_kv_heads
        qkv_TSD = self.qkv(hidden_TE).view(rows, heads, config.head_dim)
        q_THD = ops.rope_and_write(qkv_TSD, self.index, plan, self.qk_norm)
        attended = ops.attention(q_THD, self.index, plan).reshape(rows, config.num_heads * config.head_dim)
        hidden = ops.add_rms_norm(self.out(attended), residual_TE, self.post_norm_E, config.rms_norm_eps)
        return self.down(ops.silu_mul(self.gate_up(hidden)))
