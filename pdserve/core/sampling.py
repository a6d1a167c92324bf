"""How the next token of one request is chosen. Fields and defaults follow vLLM and OpenAI."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingLimits:
    """Upper bounds of a deployment, named in the error when a request passes one."""

    max_stop_strings: int = 16
    max_stop_string_chars: int = 256
    max_stop_token_ids: int = 256
    max_logit_bias: int = 1024
    max_logprobs: int = 20
    max_n: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Per-request sampling. `seed` is always set once the gateway has seen the request.

    Randomness is keyed by (seed, position), where position is the index of the token that is sampled in
    prompt + output, so that a retried, migrated or colocated run draws the same numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Stop strings; matched by the gateway, which holds the text, and cut from the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """With the model's EOS ids unless `ignore_eos`; a worker ends the request on any of them."""
    max_tokens: int = 256
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k >= 0: the chosen token's, and the top k."""
    prompt_logprobs: int | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self, *, vocab_size: int, limits: SamplingLimits) -> None:
        """Raise `InvalidRequest` that names field, value and limit for the first field out of range."""
        for name, ok, limit in self._checks(vocab_size, limits):
            if not ok:
                raise InvalidRequest(field=name, value=getattr(self, name), limit=limit)
        for text in self.stop:
            if not 1 <= len(text) <= limits.max_stop_string_chars:
                wanted = f"strings of 1 to {limits.max_stop_string_chars} characters"
                raise InvalidRequest(field="stop", value=text, limit=wanted)
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(field=name, value=token, limit=f"token ids in [0, {vocab_size})")
        for token, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequest(field=f"logit_bias[{token}]", value=bias, limit="in [-100, 100]")

    def _checks(self, vocab_size: int, limits: SamplingLimits) -> list[tuple[str, bool, str]]:
        # `0 <= x <= y` is False for NaN, which is what we want of every float below.
        top = limits.max_logprobs
        return [
            ("temperature", 0.0 <= self.temperature <= 100.0, "in [0, 100]"),
            ("top_k", 0 <= self.top_k <= vocab_size, f"in [0, {vocab_size}] (0 keeps all)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "in (0, 100]"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2^63)"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in [0, max_tokens={self.max_tokens}]"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= top, f"in [0, {top}]"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= top,
                f"in [0, {top}]",
            ),
            ("n", 1 <= self.n <= limits.max_n, f"in [1, {limits.max_n}]"),
            ("stop", len(self.stop) <= limits.max_stop_strings, f"at most {limits.max_stop_strings} strings"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= limits.max_stop_token_ids,
                f"at most {limits.max_stop_token_ids} ids",
            ),
            (
                "logit_bias",
                len(self.logit_bias) <= limits.max_logit_bias,
                f"at most {limits.max_logit_bias} entries",
            ),
        ]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one position, from the raw distribution (before penalties and temperature)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), best first."""
