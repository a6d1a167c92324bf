"""One decoder layer of the Llama family, over `ModelOps`.

Shape legend: T tokens of the step, E hidden, H query heads, K kv heads, S = H + 2K, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pdserve.models.config import ModelConfig
from pdserve.models.mlp import Mlp
from pdserve.models.ops import Linear, ModelOps, QKNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. q, k and v are one projection."""

    index: int
    input_norm_E: Tensor
    qkv: Linear
    qk_norm: QKNorm | None
    out: Linear
    post_norm_E: Tensor
    mlp: Mlp

    def forward(
        self,
        x_TE: Tensor | None,
        residual_TE: Tensor,
        ops: ModelOps,
        config: ModelConfig,
        plan: Any,
        keep_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add x (None in the first layer) to the residual, in place, and run the layer.

        Returns what the next layer adds, and the residual. keep_R: rows to go on with once their KV is
        written, for a last layer of which only some rows get logits; both results then have R rows.
        """
        eps = config.rms_norm_eps
        if x_TE is None:
            hidden = ops.rms_norm(residual_TE, self.input_norm_E, eps)
        else:
            hidden = ops.add_rms_norm(x_TE, residual_TE, self.input_norm_E, eps)
        rows = hidden.shape[0]
        qkv_TSD = self.qkv(hidden).view(rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        q_THD = ops.rope_and_write(qkv_TSD, self.index, plan, self.qk_norm)
        if keep_R is not None:
            residual_TE = residual_TE[keep_R]
            if not keep_R.shape[0]:
                return residual_TE, residual_TE
        attended = ops.attention(q_THD, self.index, plan).reshape(rows, -1)
        if keep_R is not None:
            attended = attended[keep_R]
        hidden = ops.add_rms_norm(self.out(attended), residual_TE, self.post_norm_E, eps)
        return self.mlp(hidden, ops), residual_TE
