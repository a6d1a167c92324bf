"""The sampler on a GPU: one launch of `pdkernels.sampling` per batch instead of some twenty of torch.

The draws are those of `Sampler`: the same filters in the same order, and the same number for (seed,
position). Sums are taken in another order, so a number that falls on the edge between two tokens may find the
other one.

Shape legend: N rows, V vocabulary, X entries of the flat list of adjustments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pdkernels.sampling import Adjustments, DrawParams, adjust_logits, sample
from torch import Tensor

from pdserve.engine.batch import SampleRequest
from pdserve.engine.sampler import Sampler


class DeviceSampler(Sampler):
    """See `Sampler`."""

    def _choose(self, logits_NV: Tensor, requests: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
        entries = adjustments(requests, self.vocab_size)
        if entries:
            logits_NV = logits_NV.clone()
            rows, tokens, bias, repetition, subtract = zip(*entries, strict=True)
            adjust_logits(
                logits_NV,
                Adjustments(
                    rows_X=_sent(np.array(rows, np.int32), self._device),
                    tokens_X=_sent(np.array(tokens, np.int32), self._device),
                    bias_X=_sent(np.array(bias, np.float32), self._device),
                    repetition_X=_sent(np.array(repetition, np.float32), self._device),
                    subtract_X=_sent(np.array(subtract, np.float32), self._device),
                ),
            )
        params = [request.params for request in requests]
        tokens_N, valid_N = sample(
            logits_NV,
            DrawParams(
                temperature_N=_sent(
                    np.array([0.0 if p.greedy else p.temperature for p in params], np.float32), self._device
                ),
                top_k_N=_sent(np.array([max(0, p.top_k) for p in params], np.int32), self._device),
                top_p_N=_sent(np.array([p.top_p for p in params], np.float32), self._device),
                min_p_N=_sent(np.array([p.min_p for p in params], np.float32), self._device),
                seed_N=_sent(_bits64([p.seed or 0 for p in params]), self._device),
                position_N=_sent(_bits64([len(r.tokens) for r in requests]), self._device),
            ),
        )
        return tokens_N, valid_N.bool()


Entry = tuple[int, int, float, float, float]
"""Row, token, bias to add, repetition penalty, what to subtract."""


def adjustments(requests: Sequence[SampleRequest], vocab_size: int) -> list[Entry]:
    """What `logit_bias`, `min_tokens` and the penalties change, each (row, token) once."""
    return [
        (row, token, *change)
        for row, request in enumerate(requests)
        for token, change in _changes(request).items()
        if token < vocab_size
    ]


def _changes(request: SampleRequest) -> dict[int, tuple[float, float, float]]:
    p = request.params
    bias = dict(p.logit_bias)
    if len(request.tokens) - request.num_prompt_tokens < p.min_tokens:
        bias |= dict.fromkeys({*request.eos_token_ids, *p.stop_token_ids}, float("-inf"))
    repeated = set(request.tokens) if p.repetition_penalty != 1.0 else set()
    counts: Counter[int] = Counter()
    if p.frequency_penalty != 0.0 or p.presence_penalty != 0.0:
        counts.update(request.tokens[request.num_prompt_tokens :])
    return {
        token: (
            bias.get(token, 0.0),
            p.repetition_penalty if token in repeated else 1.0,
            p.frequency_penalty * counts[token] + p.presence_penalty if token in counts else 0.0,
        )
        for token in {*bias, *repeated, *counts}
    }


def _bits64(values: Sequence[int]) -> NDArray[np.int64]:
    """Unsigned 64-bit numbers as the signed ones of the same bits."""
    return np.array(values, np.uint64).view(np.int64)


def _sent(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """On the device, by an asynchronous copy from pinned memory where that is a GPU."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
