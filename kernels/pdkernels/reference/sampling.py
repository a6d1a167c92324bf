"""Sampling of one row in torch, with a sort; random numbers in Python integers."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def uniform(seed: int, position: int) -> float:
    """Philox4x32-10 at counter (position, 0) with key `seed`: 53 bits in [0, 1)."""
    counter = [position & MASK, position >> 32 & MASK, 0, 0]
    key = [seed & MASK, seed >> 32 & MASK]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            right >> 32 ^ counter[1] ^ key[0],
            right & MASK,
            left >> 32 ^ counter[3] ^ key[1],
            left & MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return ((counter[0] << 21) | (counter[1] >> 11)) * 2.0**-53


def kept_weights(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """float64 weights of the tokens that the filters keep, 0 elsewhere; the best token weighs 1."""
    weights = ((logits_V - logits_V.max()) / temperature).exp()
    weights[weights < min_p] = 0.0
    if 0 < top_k < len(weights):
        weights[weights < weights.topk(top_k).values[-1]] = 0.0
    weights = weights.double()
    if top_p < 1.0:
        ordered = weights.sort(descending=True).values
        before = ordered.cumsum(0) - ordered
        last = ordered[before < top_p * ordered.sum()][-1]
        weights[weights < last] = 0.0
    return weights


def draw(weights_V: Tensor, number: float) -> int:
    """The token whose stretch of the cumulative weight holds `number` of the total."""
    reached = weights_V.cumsum(0)
    found = int(torch.searchsorted(reached, reached[-1:] * number, right=True))
    return min(found, len(weights_V) - 1)
