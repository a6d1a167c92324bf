"""A mixture of experts on a CPU: tokens are sorted by expert, and only experts that some token chose run.

Shape legend: T tokens of the step, E hidden, F ff of one expert, X experts, K experts of a token, N = T * K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.models.cpu_linear import Linear


@dataclass(frozen=True, slots=True)
class CpuExperts:
    """See `Experts`."""

    gate_up: tuple[Linear, ...]
    down: tuple[Linear, ...]
    silu_mul: Callable[[Tensor], Tensor]

    def __call__(self, x_TE: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        experts_N, order_N = expert_TK.flatten().sort(stable=True)
        counts_X = experts_N.bincount(minlength=len(self.down)).tolist()
        token_N = order_N // expert_TK.shape[1]
        y_NE = x_TE[token_N]
        first = 0
        for expert, count in enumerate(counts_X):
            if not count:
                continue
            part = slice(first, first + count)
            y_NE[part] = self.down[expert](self.silu_mul(self.gate_up[expert](y_NE[part])))
            first += count
        y_NE.mul_(weight_TK.flatten()[order_N].unsqueeze(-1))
        return torch.zeros_like(x_TE).index_add_(0, token_N, y_NE)
