"""What sampling parameters do to logits, for a whole batch at once; every function works in place by rows.

Entries that only some rows have (biases, penalties) are collected into one flat list of (row, token) and
applied by one gather and one scatter. Shape legend: N rows, V vocabulary, X entries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import SampleRequest

TOP_P_CANDIDATES: Final = (128, 2048)
"""On a CPU, top_p looks at this many best tokens first; it sorts the vocabulary where they fall short."""


def apply_bias(logits_NV: Tensor, requests: Sequence[SampleRequest]) -> None:
    """Add `logit_bias`."""
    entries = [
        (row, token, bias) for row, r in enumerate(requests) for token, bias in r.params.logit_bias.items()
    ]
    if entries:
        rows, tokens, values = _columns(entries, logits_NV.device)
        logits_NV[rows, tokens] += values


def mask_ends(logits_NV: Tensor, requests: Sequence[SampleRequest]) -> None:
    """Before `min_tokens`, EOS and the request's stop ids cannot be drawn."""
    entries = [
        (row, token, 0.0)
        for row, r in enumerate(requests)
        if len(r.tokens) - r.num_prompt_tokens < r.params.min_tokens
        for token in {*r.eos_token_ids, *r.params.stop_token_ids}
    ]
    if entries:
        rows, tokens, _ = _columns(entries, logits_NV.device)
        logits_NV[rows, tokens] = float("-inf")


def apply_penalties(logits_NV: Tensor, requests: Sequence[SampleRequest]) -> None:
    """Repetition over prompt and output (Keskar et al. 2019: positive logits are divided, negative ones
    multiplied), then frequency and presence over the output."""
    repeated = [
        (row, token, r.params.repetition_penalty)
        for row, r in enumerate(requests)
        if r.params.repetition_penalty != 1.0
        for token in set(r.tokens)
    ]
    if repeated:
        rows, tokens, penalty = _columns(repeated, logits_NV.device)
        old = logits_NV[rows, tokens]
        logits_NV[rows, tokens] = torch.where(old > 0, old / penalty, old * penalty)
    counted = [
        (row, token, r.params.frequency_penalty * count + r.params.presence_penalty)
        for row, r in enumerate(requests)
        if r.params.frequency_penalty != 0.0 or r.params.presence_penalty != 0.0
        for token, count in Counter(r.tokens[r.num_prompt_tokens :]).items()
    ]
    if counted:
        rows, tokens, penalty = _columns(counted, logits_NV.device)
        logits_NV[rows, tokens] -= penalty


def filtered_probabilities(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities (float32, not normalised) after temperature, min_p, top_k and top_p.

    Dropped tokens are 0. The filters keep every token at least as likely as the last one they must keep, so
    ties stay together. The greatest entry of each row is 1.
    """
    device = logits_NV.device
    temperature = torch.tensor([p.temperature for p in params], device=device)[:, None]
    # The maximum is subtracted first: a tiny temperature then sends others to zero and nothing to infinity.
    weights = ((logits_NV - logits_NV.amax(dim=-1, keepdim=True)) / temperature).exp_()
    if any(p.min_p > 0.0 for p in params):
        least = torch.tensor([p.min_p for p in params], device=device)[:, None]
        weights = _at_least(weights, least)
    if any(p.top_k > 0 for p in params):
        _keep_top_k(weights, [p.top_k for p in params])
    if any(p.top_p < 1.0 for p in params):
        _keep_top_p(weights, [p.top_p for p in params])
    return weights


def _keep_top_k(weights_NV: Tensor, counts: list[int]) -> None:
    vocab = weights_NV.shape[-1]
    rows = [row for row, k in enumerate(counts) if 0 < k < vocab]
    if not rows:
        return
    index = torch.tensor(rows, device=weights_NV.device)
    last = torch.tensor([counts[row] - 1 for row in rows], device=weights_NV.device)
    some = weights_NV[index]
    best = some.topk(max(counts[row] for row in rows), dim=-1).values
    weights_NV[index] = _at_least(some, best.gather(1, last[:, None]))


def _keep_top_p(weights_NV: Tensor, masses: list[float]) -> None:
    rows = [row for row, p in enumerate(masses) if p < 1.0]
    index = torch.tensor(rows, device=weights_NV.device)
    wanted = torch.tensor([masses[row] for row in rows], dtype=torch.float64, device=weights_NV.device)
    some = weights_NV[index]
    wanted_mass = wanted[:, None] * some.sum(dim=-1, keepdim=True, dtype=torch.float64)
    best = _best(some, wanted_mass)
    # A token is kept while the mass before it has not reached p; the first always is.
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    last = ((before < wanted_mass).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
    weights_NV[index] = _at_least(some, best.gather(1, last))


def _best(weights_NV: Tensor, mass_N1: Tensor) -> Tensor:
    """The greatest weights of each row, descending, as many as the mass needs."""
    if weights_NV.device.type == "cpu":
        for count in TOP_P_CANDIDATES:
            if count < weights_NV.shape[-1]:
                best = weights_NV.topk(count, dim=-1).values
                if bool((best.sum(dim=-1, keepdim=True, dtype=torch.float64) >= mass_N1).all()):
                    return best
    return weights_NV.sort(dim=-1, descending=True).values


def _at_least(weights_NV: Tensor, least_N1: Tensor) -> Tensor:
    """Smaller weights become zero. A product: filling by a mask is slower on a CPU."""
    return weights_NV * (weights_NV >= least_N1)


def _columns(
    entries: Sequence[tuple[int, int, float]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens, values = zip(*entries, strict=True)
    return (
        torch.tensor(rows, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )
