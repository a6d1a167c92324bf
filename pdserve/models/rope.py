"""Rotary position embedding: inverse frequencies and the table of factors.

Sources: Su et al. 2021 (arXiv:2104.09864); the `llama3` scaling is that of the Llama 3.1 model card, which
config.json calls `rope_scaling`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdserve.models.config import RopeConfig, RopeKind


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians per position of each pair of dimensions."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq = 1.0 / (rope.theta**exponent)
    match rope.kind:
        case RopeKind.DEFAULT:
            return freq
        case RopeKind.LINEAR:
            return freq / rope.factor
        case RopeKind.LLAMA3:
            return _llama3(freq, rope)


def _llama3(freq: Tensor, rope: RopeConfig) -> Tensor:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""
    wavelength = 2 * math.pi / freq
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    keep = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - keep) * freq / rope.factor + keep * freq
    scaled = torch.where(wavelength > longest, freq / rope.factor, between)
    return torch.where(wavelength < shortest, freq, scaled)


def rope_table(rope: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [positions, head_dim], arranged for pairs (i, i + head_dim / 2).

    With half = head_dim / 2: rotated = x * cos + swap(x) * sin, where swap exchanges the halves; the first
    half of `sin` carries the minus sign.
    """
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(rope, head_dim))
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
