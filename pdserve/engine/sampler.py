"""Next tokens from logits, per request and independent of who else is in the batch.

Order of steps, as vLLM's: logit_bias and min_tokens, penalties, temperature, min_p, top_k, top_p, draw.
A draw is the inverse of the cumulative distribution, in token order, at one random number
keyed by (seed, position).

Shape legend: N rows, V vocabulary, L prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.core.errors import NoValidToken
from pdserve.core.sampling import SamplingParams, TokenLogprobs
from pdserve.engine import logits_processing as processing
from pdserve.engine.batch import Sampled, SampleFailed, SampleRequest, SampleResult
from pdserve.engine.philox import uniform

RUN: Final = 128
BELOW_ONE: Final = 1.0 - 2.0**-52


class Sampler:
    """Stateless between calls; safe to share by threads that each bring their own logits."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @torch.inference_mode()
    def sample(self, logits_NV: Tensor, requests: Sequence[SampleRequest]) -> list[SampleResult]:
        """One token per row. logits_NV: float32, rows as `requests`; not changed.

        A row without a valid token comes back as `SampleFailed` and disturbs no other.
        """
        if not requests:
            return []
        if not any(_touches_logits(r) for r in requests):
            tokens, found = _argmax(logits_NV)
        else:
            tokens, found = self._choose(logits_NV, requests)
        chosen, valid = tokens.tolist(), found.tolist()
        logprobs = self._logprobs(logits_NV, requests, chosen)
        return [
            Sampled(token, logprob) if ok else SampleFailed(_no_token(logits_NV[row]))
            for row, (token, ok, logprob) in enumerate(zip(chosen, valid, logprobs, strict=True))
        ]

    @torch.inference_mode()
    def prompt_logprobs(self, logits_LV: Tensor, next_tokens: Sequence[int], k: int) -> list[TokenLogprobs]:
        """Of each next token given the rows before it, with the k best alternatives; raw distribution."""
        return _token_logprobs(logits_LV, list(next_tokens), [k] * len(next_tokens))

    def _choose(self, logits_NV: Tensor, requests: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
        work = logits_NV
        if any(_edits_logits(r) for r in requests):
            work = logits_NV.clone()
            processing.apply_bias(work, requests)
            processing.mask_ends(work, requests)
            processing.apply_penalties(work, requests)
        random = [row for row, request in enumerate(requests) if not request.params.greedy]
        if len(random) == len(requests):
            return self._draw(work, requests)
        tokens, found = _argmax(work)
        if random:
            rows = torch.tensor(random, device=logits_NV.device)
            drawn, sound = self._draw(work[rows], [requests[row] for row in random])
            tokens[rows] = drawn
            found[rows] &= sound
        return tokens, found

    def _draw(self, logits_NV: Tensor, requests: Sequence[SampleRequest]) -> tuple[Tensor, Tensor]:
        params = [request.params for request in requests]
        probs_NV = processing.filtered_probabilities(logits_NV, params)
        numbers = [uniform(_seed(request.params), len(request.tokens)) for request in requests]
        return invert_cumulative(probs_NV, torch.tensor(numbers, dtype=torch.float64, device=probs_NV.device))

    def _logprobs(
        self, logits_NV: Tensor, requests: Sequence[SampleRequest], tokens: list[int]
    ) -> list[TokenLogprobs | None]:
        out: list[TokenLogprobs | None] = [None] * len(requests)
        wanted = [(row, r.params.logprobs) for row, r in enumerate(requests) if r.params.logprobs is not None]
        if wanted:
            rows = [row for row, _ in wanted]
            some = logits_NV[torch.tensor(rows, device=logits_NV.device)]
            found = _token_logprobs(some, [tokens[row] for row in rows], [k for _, k in wanted])
            for row, entry in zip(rows, found, strict=True):
                out[row] = entry
        return out


def invert_cumulative(weights_NV: Tensor, numbers_N: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which each row's running sum passes number * total; and whether the row has a sum.

    In two steps, first among runs of `RUN` tokens and then within the one found: a running sum over the whole
    vocabulary would cost more than all the rest. float64 numbers in [0, 1).
    """
    rows, vocab = weights_NV.shape
    padded = F.pad(weights_NV, (0, -vocab % RUN)) if vocab % RUN else weights_NV
    runs_NCR = padded.view(rows, -1, RUN)
    cumulative_NC = runs_NCR.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    sound_N = torch.isfinite(cumulative_NC[:, -1]) & (cumulative_NC[:, -1] > 0)
    target_N1 = numbers_N[:, None] * cumulative_NC[:, -1:]
    # A row without a sum finds an index past the end; its result is dropped.
    run_N1 = torch.searchsorted(cumulative_NC, target_N1, right=True).clamp_(max=runs_NCR.shape[1] - 1)
    end_N1 = cumulative_NC.gather(1, run_N1)
    begin_N1 = torch.where(run_N1 > 0, cumulative_NC.gather(1, (run_N1 - 1).clamp(min=0)), 0.0)
    inside_NR = runs_NCR[torch.arange(rows, device=weights_NV.device), run_N1[:, 0]]
    inside_NR = inside_NR.cumsum(dim=-1, dtype=torch.float64)
    # As a share of the run, so that the rounding of its sum cannot lead outside it.
    share_N1 = ((target_N1 - begin_N1) / (end_N1 - begin_N1)).clamp_(0.0, BELOW_ONE)
    within_N1 = torch.searchsorted(inside_NR, share_N1 * inside_NR[:, -1:], right=True)
    return (run_N1 * RUN + within_N1).squeeze(1).clamp_(max=vocab - 1), sound_N


def _touches_logits(request: SampleRequest) -> bool:
    """False: the answer is the argmax of the raw logits."""
    return not request.params.greedy or _edits_logits(request)


def _edits_logits(request: SampleRequest) -> bool:
    p = request.params
    return (
        bool(p.logit_bias)
        or p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or len(request.tokens) - request.num_prompt_tokens < p.min_tokens
    )


def _argmax(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Best token of each row, the lowest id on ties, and whether it is one: NaN counts as the greatest."""
    best, tokens = logits_NV.max(dim=-1)
    return tokens, torch.isfinite(best)


def _seed(params: SamplingParams) -> int:
    return 0 if params.seed is None else params.seed


def _no_token(logits_V: Tensor) -> NoValidToken:
    if bool(torch.isnan(logits_V).any()):
        return NoValidToken(
            "the model's logits hold NaN; the checkpoint or its dtype does not fit this model"
        )
    return NoValidToken("no token has a finite logit; logit_bias or min_tokens may mask all of them")


def _token_logprobs(logits_NV: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens`, with the `counts[i]` best of each row."""
    if not tokens:
        return []
    logprobs_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    index = torch.tensor(tokens, device=logits_NV.device)
    own = logprobs_NV.gather(1, index[:, None]).squeeze(1).tolist()
    k = min(max(counts), logits_NV.shape[-1])
    if k == 0:
        return [TokenLogprobs(token, logprob) for token, logprob in zip(tokens, own, strict=True)]
    values, ids = logprobs_NV.topk(k, dim=-1)
    best = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, count, (row_ids, row_values) in zip(tokens, own, counts, best, strict=True)
    ]
