"""Sampling: each parameter against a slow reference, the distribution, and independence of the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from pdserve.core.errors import NoValidToken
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Sampled, SampleFailed, SampleRequest
from pdserve.engine.logits_processing import TOP_P_CANDIDATES, filtered_probabilities
from pdserve.engine.sampler import RUN, Sampler, invert_cumulative

VOCAB = 50
EOS = 2


def request(tokens: list[int] | None = None, prompt: int | None = None, **fields: Any) -> SampleRequest:
    tokens = [5, 6, 7] if tokens is None else tokens
    fields.setdefault("seed", 1)
    return SampleRequest(
        params=SamplingParams(**fields),
        tokens=tokens,
        num_prompt_tokens=len(tokens) if prompt is None else prompt,
        eos_token_ids=(EOS,),
    )


def sample(logits: torch.Tensor, requests: list[SampleRequest]) -> list[Sampled]:
    found = Sampler(logits.shape[-1], "cpu").sample(logits, requests)
    assert all(isinstance(entry, Sampled) for entry in found)
    return [entry for entry in found if isinstance(entry, Sampled)]


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def slow_probabilities(logits: list[float], r: SampleRequest) -> list[float]:
    """The definition, one token at a time."""
    p = r.params
    x = [value + p.logit_bias.get(token, 0.0) for token, value in enumerate(logits)]
    output = r.tokens[r.num_prompt_tokens :]
    if len(output) < p.min_tokens:
        for token in (*r.eos_token_ids, *p.stop_token_ids):
            x[token] = -math.inf
    for token in set(r.tokens):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= p.frequency_penalty * count + p.presence_penalty
    weights = [math.exp((value - max(x)) / p.temperature) for value in x]
    weights = [w if w >= p.min_p else 0.0 for w in weights]
    if p.top_k:
        last = sorted(weights, reverse=True)[p.top_k - 1]
        weights = [w if w >= last else 0.0 for w in weights]
    total, mass, kept = sum(weights), 0.0, []
    for w in sorted(weights, reverse=True):
        if kept and mass >= p.top_p * total:
            break
        kept.append(w)
        mass += w
    weights = [w if w >= min(kept) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k_all": {"top_k": VOCAB},
    "top_p": {"top_p": 0.7},
    "tiny_top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "filters_together": {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "negative_penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.5, "repetition_penalty": 0.7},
    "bias": {"logit_bias": {3: 4.0, 9: -100.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (4, 11)},
}


def case_request(name: str, seed: int = 1, tokens: list[int] | None = None) -> SampleRequest:
    tokens = [7, 8, 9, 3, 3, 3, 12, 40] if tokens is None else tokens
    return request(tokens, prompt=3, seed=seed, **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution_that_the_parameters_define(name: str) -> None:
    draws = 4000
    logits = random_logits(1, seed=3)
    logits[0, EOS] = 9.0
    requests = [case_request(name, seed=seed) for seed in range(draws)]
    counts = Counter(s.token for s in sample(logits.expand(draws, VOCAB), requests))
    want = slow_probabilities(logits[0].tolist(), requests[0])
    assert {token for token in counts if want[token] == 0.0} == set()
    # Pearson's chi-square over tokens expected at least 5 times, the rest as one bin.
    bins = [(counts[t], p * draws) for t, p in enumerate(want) if p * draws >= 5]
    rest = (draws - sum(seen for seen, _ in bins), draws - sum(expected for _, expected in bins))
    if rest[1] >= 1:
        bins.append(rest)
    chi_square = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    freedom = len(bins) - 1
    # Wilson-Hilferty: beyond 4.5 sigma by chance in one of 300,000 choices of seeds; these seeds are fixed.
    bound = (
        0.0 if freedom == 0 else freedom * (1 - 2 / (9 * freedom) + 4.5 * math.sqrt(2 / (9 * freedom))) ** 3
    )
    assert chi_square <= bound + 1e-9


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    names = list(CASES)
    logits = random_logits(len(names), seed=4)
    requests = [case_request(other, seed=17 + i) for i, other in enumerate(names)]
    together = sample(logits, requests)
    row = names.index(name)
    assert sample(logits[row : row + 1], [requests[row]])[0] == together[row]
    order = list(range(len(names)))
    random.Random(1).shuffle(order)
    shuffled = sample(logits[order], [requests[i] for i in order])
    assert shuffled[order.index(row)] == together[row]


def test_the_draw_changes_with_seed_and_with_position_and_with_nothing_else() -> None:
    flat = torch.zeros(1, 4096)
    first = sample(flat, [request([1, 2, 3], seed=9)])[0].token
    assert sample(flat, [request([9, 9, 9], seed=9)])[0].token == first
    assert sample(flat, [request([1, 2, 3], prompt=1, seed=9)])[0].token == first
    assert sample(flat, [request([1, 2, 3], seed=10)])[0].token != first
    assert sample(flat, [request([1, 2, 3, 4], seed=9)])[0].token != first


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.full((3, VOCAB), -1.0)
    logits[0, [9, 30]] = 2.0
    logits[1, :] = 0.0
    logits[2, VOCAB - 1] = 5.0
    greedy = [request(temperature=0.0)] * 3
    assert [s.token for s in sample(logits, greedy)] == [9, 0, VOCAB - 1]
    # The slow path: one row of the batch is random.
    mixed = sample(torch.cat((logits, logits[:1])), [*greedy, request(temperature=1.0)])
    assert [s.token for s in mixed[:3]] == [9, 0, VOCAB - 1]


def test_greedy_obeys_bias_penalties_and_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 8], logits[0, 9] = 3.0, 2.0, 1.0
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, EOS),
        ({"min_tokens": 1}, 8),
        ({"min_tokens": 1, "stop_token_ids": (8,)}, 9),
        ({"logit_bias": {30: 50.0}}, 30),
        ({"min_tokens": 1, "repetition_penalty": 3.0}, 9),
    ]
    for fields, want in cases:
        assert sample(logits, [request([8, 8], temperature=0.0, **fields)])[0].token == want, fields
    assert sample(logits, [request([8, 8], prompt=1, temperature=0.0, min_tokens=1)])[0].token == EOS


def test_sampling_leaves_the_logits_alone() -> None:
    logits = random_logits(len(CASES))
    before = logits.clone()
    sample(logits, [case_request(name) for name in CASES])
    assert torch.equal(logits, before)


def test_an_extreme_temperature_is_no_nan() -> None:
    logits = random_logits(2)
    best, hot = sample(logits, [request(temperature=1e-30), request(temperature=100.0)])
    assert best.token == int(logits[0].argmax())
    assert 0 <= hot.token < VOCAB


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_of_nan_fails_alone(temperature: float) -> None:
    logits = random_logits(3)
    alone = sample(logits[[0, 2]], [request(temperature=temperature, seed=s) for s in (0, 2)])
    logits[1, 7] = float("nan")
    found = Sampler(VOCAB, "cpu").sample(
        logits, [request(temperature=temperature, seed=s, logprobs=1) for s in range(3)]
    )
    assert isinstance(found[1], SampleFailed)
    assert isinstance(found[1].error, NoValidToken)
    assert "NaN" in str(found[1].error)
    for row, want in ((0, alone[0]), (2, alone[1])):
        entry = found[row]
        assert isinstance(entry, Sampled)
        assert entry.token == want.token


def test_a_row_with_every_token_masked_fails_alone() -> None:
    logits = torch.full((2, 4), -math.inf)
    logits[:, EOS] = 1.0
    found = Sampler(4, "cpu").sample(logits, [request([1], min_tokens=1), request([1])])
    assert isinstance(found[0], SampleFailed)
    assert found[1] == Sampled(EOS, None)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(3)
    want = torch.log_softmax(logits, -1)
    found = sample(
        logits,
        [
            request(temperature=0.3, top_k=1, logit_bias={40: 100.0}, logprobs=2),
            request(temperature=0.0, logprobs=0),
            request(temperature=0.0),
        ],
    )
    assert found[0].token == 40
    first, second = found[0].logprobs, found[1].logprobs
    assert first is not None
    assert second is not None
    assert first.token == 40
    assert first.logprob == pytest.approx(float(want[0, 40]))
    best = want[0].topk(2)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert second.top == ()
    assert found[2].logprobs is None


def test_prompt_logprobs_give_each_next_token_its_probability() -> None:
    logits = random_logits(4)
    found = Sampler(VOCAB, "cpu").prompt_logprobs(logits, [3, 1, 4, 1], 3)
    want = torch.log_softmax(logits, -1)
    assert [entry.token for entry in found] == [3, 1, 4, 1]
    assert [entry.logprob for entry in found] == pytest.approx(
        [float(want[i, t]) for i, t in enumerate([3, 1, 4, 1])]
    )
    assert [len(entry.top) for entry in found] == [3, 3, 3, 3]
    assert Sampler(VOCAB, "cpu").prompt_logprobs(logits[:0], [], 3) == []


@pytest.mark.parametrize("sharpness", [0.001, 1.0, 5.0], ids=["all", "second_look", "first_look"])
def test_top_p_over_a_large_vocabulary_equals_the_full_sort(sharpness: float) -> None:
    """The flatter the distribution, the more tokens are looked at."""
    vocab, p = 4 * TOP_P_CANDIDATES[-1], 0.6
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1)) * sharpness
    kept = filtered_probabilities(logits, [SamplingParams(top_p=p)] * 2) > 0
    for row in range(2):
        order = logits[row].double().softmax(-1).sort(descending=True)
        count = int((order.values.cumsum(0) - order.values < p).sum())
        # float32 weights against float64: the boundary may fall one token off.
        assert abs(int(kept[row].sum()) - count) <= 1
        assert bool(kept[row, order.indices[: count - 1]].all())


@pytest.mark.parametrize("vocab", [1, RUN - 1, RUN, RUN + 1, 5 * RUN + 7])
def test_a_draw_lands_on_the_token_whose_share_of_the_line_it_hits(vocab: int) -> None:
    rng = random.Random(vocab)
    weights = torch.tensor([[rng.choice([0.0, 0.0, rng.random()]) for _ in range(vocab)]] * 64)
    weights[:, vocab // 2] = 0.5
    numbers = [0.0, 1.0 - 2.0**-53, *(rng.random() for _ in range(62))]
    tokens, sound = invert_cumulative(weights, torch.tensor(numbers, dtype=torch.float64))
    assert bool(sound.all())
    line = weights[0].double().cumsum(0)
    for number, token in zip(numbers, tokens.tolist(), strict=True):
        assert weights[0, token] > 0
        begin = float(line[token] - weights[0, token].double())
        # Sums of float32 runs against float64: the edges may lie a rounding apart.
        slack = 1e-6 * float(line[-1])
        assert begin - slack <= number * float(line[-1]) <= float(line[token]) + slack


def test_no_rows_give_no_tokens() -> None:
    assert Sampler(VOCAB, "cpu").sample(torch.empty(0, VOCAB), []) == []
