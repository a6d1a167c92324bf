"""The layers of a model that several ranks compute together: sums, a shared vocabulary, one router.

Shape legend: T tokens of the step, I inputs, E hidden, V vocabulary, W a rank's part of it, X experts, R rows
that get logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.models.ops import Experts, Linear
from pdserve.models.ranks import Ranks
from pdserve.models.sharding import vocabulary_part


@dataclass(frozen=True, slots=True)
class SummedLinear:
    """A projection whose inputs are divided among the ranks."""

    part: Linear
    ranks: Ranks

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.ranks.sum(self.part(x_TI))


@dataclass(frozen=True, slots=True)
class SummedExperts:
    """Experts of each of which every rank has a part."""

    part: Experts
    ranks: Ranks

    def __call__(self, x_TE: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        return self.ranks.sum(self.part(x_TE, weight_TK, expert_TK))


@dataclass(frozen=True, slots=True)
class SharedRouter:
    """A mixture's router, computed on rank 0: ranks that chose different experts would add up nonsense, and a
    last bit decides near-ties."""

    router: Linear
    ranks: Ranks
    num_experts: int

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self.ranks.rank == 0:
            return self.ranks.from_first(self.router(x_TI).contiguous())
        return self.ranks.from_first(x_TI.new_empty(x_TI.shape[0], self.num_experts))


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """Embedding and head, of which each rank has the rows of some tokens."""

    vocab_size: int
    ranks: Ranks

    def embed(self, tokens_T: Tensor, part_WE: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, E]: one rank has each token's row, the others add zeros."""
        first, last = vocabulary_part(self.vocab_size, self.ranks.rank, self.ranks.size)
        elsewhere_T = (tokens_T < first) | (tokens_T >= last)
        rows = F.embedding((tokens_T - first).clamp_(0, last - first - 1), part_WE).to(dtype)
        return self.ranks.sum(rows.masked_fill_(elsewhere_T.unsqueeze(-1), 0.0))

    def widths(self) -> Sequence[int]:
        """Tokens of each rank."""
        size = self.ranks.size
        bounds = (vocabulary_part(self.vocab_size, rank, size) for rank in range(size))
        return [last - first for first, last in bounds]


@dataclass(frozen=True, slots=True)
class GatheredHead:
    """Logits of the whole vocabulary on rank 0, float32; the others return their own part."""

    part: Linear
    vocabulary: SharedVocabulary

    def __call__(self, x_TI: Tensor) -> Tensor:
        local_RW = self.part(x_TI).float()
        widths = self.vocabulary.widths()
        padded = F.pad(local_RW, (0, max(widths) - local_RW.shape[1]))
        parts = self.vocabulary.ranks.gather(padded.contiguous())
        if parts is None:
            return local_RW
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
