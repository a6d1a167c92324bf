"""When an answer ends, as far as a worker can see: stop strings are the gateway's, which holds the text."""

from __future__ import annotations

from pdserve.core.messages import FinishReason, RequestSpec


def finish_reason(spec: RequestSpec, token: int, *, num_tokens: int, max_len: int) -> FinishReason | None:
    """Whether `token` ends the answer. `num_tokens` counts prompt + output, `token` included.

    Up to min_tokens nothing but the context's end stops it; the sampler does not draw EOS there either.
    """
    sampling = spec.sampling
    num_output = num_tokens - spec.num_prompt_tokens
    if num_output > sampling.min_tokens:
        if token in sampling.stop_token_ids:
            return FinishReason.STOP
        if not sampling.ignore_eos and token in spec.eos_token_ids:
            return FinishReason.STOP
    if num_output >= sampling.max_tokens or num_tokens >= max_len:
        return FinishReason.LENGTH
    return None
