"""The MLP of a decoder layer: one gated SiLU MLP, or a mixture of them.

Shape legend: T tokens of the step, E hidden, F ff of one MLP, X experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pdserve.models.ops import Experts, Linear, ModelOps


class Mlp(Protocol):
    def __call__(self, x_TE: Tensor, ops: ModelOps) -> Tensor:
        """[T, E], in the activation dtype."""
        ...


@dataclass(frozen=True, slots=True)
class DenseMlp:
    gate_up: Linear
    """Gate and up in one projection, gate first."""
    down: Linear

    def __call__(self, x_TE: Tensor, ops: ModelOps) -> Tensor:
        return self.down(ops.silu_mul(self.gate_up(x_TE)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeMlp:
    """A softmax over the router's logits weighs the experts; the K largest are computed (Mixtral, 2024)."""

    router: Linear
    experts: Experts
    experts_per_token: int
    normalised: bool

    def __call__(self, x_TE: Tensor, ops: ModelOps) -> Tensor:
        weight_TX = torch.softmax(self.router(x_TE).float(), dim=-1)
        weight_TK, expert_TK = torch.topk(weight_TX, self.experts_per_token, dim=-1)
        if self.normalised:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return self.experts(x_TE, weight_TK, expert_TK)
