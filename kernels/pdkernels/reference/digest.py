"""The digest of scattered pieces in torch, which also defines it. int64 wraps around; shifts are unsigned."""

from __future__ import annotations

import torch
from torch import Tensor

K_PLACE = -0x61C8864680B583EB
K_FIRST = -0x40A7B892E31B1A47
K_SECOND = -0x6B2FB644ECCEEE15


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def digest_pieces(words: Tensor, pieces_3P: Tensor) -> Tensor:
    digests = []
    for first, count, place in (4 * pieces_3P.T).tolist():
        word = words[first : first + count].long() & 0xFFFFFFFF
        at = torch.arange(place, place + count, dtype=torch.int64, device=words.device)
        x = word ^ (at * K_PLACE)
        x = (x ^ _shifted(x, 32)) * K_FIRST
        x = (x ^ _shifted(x, 29)) * K_SECOND
        digests.append((x ^ _shifted(x, 32)).sum())
    return torch.stack(digests) if digests else words.new_zeros(0, dtype=torch.int64)
