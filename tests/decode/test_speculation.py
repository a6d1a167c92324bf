"""What is guessed, how deep, and which guesses stand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from decode.drafting import PromptLookup
from decode.run import DecodePlan, DecodeRun, Turn
from decode.speculation import Speculation, StepCost, choose_depths, standing
from pdserve.core.errors import NoValidToken
from pdserve.core.sampling import SamplingParams
from pdserve.engine.batch import Sampled, SampleFailed, SampleRequest, SampleResult
from pdserve.engine.sampler import Sampler
from tests.support.runs import run_of


def turn_of(run: DecodeRun) -> Turn:
    return Turn(run, len(run.tokens) - 1, len(run.tokens), final=True)


def guess(tokens: list[int], count: int, shortest: int = 2, longest: int = 4) -> list[int]:
    drafter, run = PromptLookup(min_tokens=shortest, max_tokens=longest), run_of(tokens)
    drafter.limit(run, count)
    turn = turn_of(run)
    turn.depth = count
    drafter.fill([turn])
    return turn.drafts


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the latest of two places
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # a longer ending goes before a later one
        ([5, 6, 5, 6, 5, 6], [5, 6, 5]),  # on into the guess itself
        ([4, 4, 4], [4, 4, 4]),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 2], []),  # one token alike is too few
        ([1], []),
        ([1, 1], []),
    ],
)
def test_what_followed_the_same_tokens_before_is_guessed(tokens: list[int], expected: list[int]) -> None:
    assert guess(tokens, 3) == expected


def test_a_lookup_agrees_with_a_search_by_hand_as_a_text_grows() -> None:
    rng = random.Random(5)
    drafter, tokens = PromptLookup(min_tokens=2, max_tokens=3), rng.choices(range(4), k=300)
    run = run_of(tokens[:2])
    for size in range(2, 300):
        run.tokens = tokens[:size]
        found: list[int] = []
        for length in (3, 2):
            ending = tokens[size - length : size]
            places = [i for i in range(size - length) if tokens[i : i + length] == ending]
            if size > length and places:
                found = tokens[places[-1] + length : size][:1]
                break
        drafter.limit(run, 1)
        turn = turn_of(run)
        turn.depth = 1
        drafter.fill([turn])
        assert turn.drafts == found, size


def test_guesses_stand_up_to_the_first_that_is_not_what_was_sampled() -> None:
    a, b, c = Sampled(1, None), Sampled(2, None), Sampled(3, None)
    failed = SampleFailed(NoValidToken("x"))
    assert standing([], [a]) == [a]
    assert standing([1, 2], [a, b, c]) == [a, b, c]
    assert standing([1, 9], [a, b, c]) == [a, b]
    assert standing([9, 2], [a, b, c]) == [a]
    assert standing([1, 2], [a, failed, c]) == [a, failed]


def test_checked_guesses_leave_the_distribution_as_it_was() -> None:
    """Two tokens per seed, with guesses from another distribution: each outcome as often as it should be."""
    vocab, count = 4, 8_000
    sampler = Sampler(vocab, "cpu")
    first = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    then = torch.tensor(
        [[0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.25] * 4, [0.05, 0.05, 0.1, 0.8]]
    ).log()
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=4) for seed in range(count)]
    drafts = random.Random(1).choices(range(vocab), weights=[8, 1, 1, 1], k=count)

    def sampled(logits_NV: torch.Tensor, before: list[list[int]]) -> list[SampleResult]:
        rows = zip(params, before, strict=True)
        requests = [
            SampleRequest(params=p, tokens=[0, *tokens], num_prompt_tokens=1, eos_token_ids=())
            for p, tokens in rows
        ]
        return sampler.sample(logits_NV, requests)

    on_first = sampled(first.expand(count, vocab), [[]] * count)
    on_draft = sampled(then[drafts], [[draft] for draft in drafts])
    kept = [
        [result.token for result in standing([draft], pair) if isinstance(result, Sampled)]
        for draft, *pair in zip(drafts, on_first, on_draft, strict=True)
    ]
    # Where the guess fell, the next step samples what follows.
    again = sampled(then[[tokens[0] for tokens in kept]], [tokens[:1] for tokens in kept])
    seen = torch.zeros(vocab, vocab)
    for tokens, result in zip(kept, again, strict=True):
        assert isinstance(result, Sampled)
        assert tokens[1:] in ([], [result.token]), "what stands is what plain decoding draws"
        seen[tokens[0], result.token] += 1
    expected = count * first.exp()[:, None] * then.exp()
    chi_squared = float(((seen - expected) ** 2 / expected).sum())
    assert chi_squared < 37.7, "15 degrees of freedom, p = 0.001"


def test_guesses_are_made_where_rows_are_cheap_and_not_where_they_are_dear() -> None:
    cheap = choose_depths([0.9, 0.1], [5, 5], num_rows=2, fixed_s=10.0, per_row_s=0.1)
    assert cheap[0] == 5
    assert cheap[0] > cheap[1]
    dear = choose_depths([0.9, 0.1], [5, 5], num_rows=2, fixed_s=0.1, per_row_s=10.0)
    assert dear == [0, 0]


def test_the_chosen_depths_are_the_best_there_are() -> None:
    rng = random.Random(3)
    for _ in range(60):
        rates = [rng.random() for _ in range(3)]
        limits = [rng.randrange(4) for _ in range(3)]
        fixed_s, per_row_s, per_depth_s = rng.random() * 5, rng.random(), rng.choice([0.0, rng.random()])

        def rate(
            depths: tuple[int, ...] | list[int],
            rates: list[float] = rates,
            costs: tuple[float, float, float] = (fixed_s, per_row_s, per_depth_s),
        ) -> float:
            tokens = sum(1 + sum(r**i for i in range(1, d + 1)) for r, d in zip(rates, depths, strict=True))
            return tokens / (costs[0] + costs[1] * (3 + sum(depths)) + costs[2] * max(depths))

        chosen = choose_depths(
            rates, limits, num_rows=3, fixed_s=fixed_s, per_row_s=per_row_s, per_depth_s=per_depth_s
        )
        best = max(rate(depths) for depths in itertools.product(*[range(limit + 1) for limit in limits]))
        assert rate(chosen) >= (1 - 1e-9) * best


def test_the_cost_of_a_row_is_learned_from_steps_of_different_sizes() -> None:
    cost = StepCost()
    for rows in (1, 6, 1, 3, 8, 1, 4) * 10:
        cost.observe(rows, 0.010 + 0.002 * rows)
    fixed_s, per_row_s = cost.line()
    assert fixed_s == pytest.approx(0.010, rel=0.01)
    assert per_row_s == pytest.approx(0.002, rel=0.01)


def steps(speculation: Speculation, run: DecodeRun, truth: list[int], per_row_s: float, count: int) -> int:
    """Decode `truth` in as many steps; how many rows were computed."""
    rows = 0
    for _ in range(count):
        turn = turn_of(run)
        plan = DecodePlan([turn], 0.0)
        speculation.plan([turn], lambda run, wanted: wanted, 100)
        speculation.fill(plan, lambda: 0.0)
        size = len(run.tokens)
        accepted = 0
        while accepted < len(turn.drafts) and turn.drafts[accepted] == truth[size + accepted]:
            accepted += 1
        run.tokens += truth[size : size + accepted + 1]
        speculation.judged(turn, accepted)
        rows += 1 + len(turn.drafts)
        speculation.stepped(plan, 0.010 + per_row_s * (1 + len(turn.drafts)))
    return rows


def lookup(num_tokens: int = 4) -> Speculation:
    return Speculation(
        PromptLookup(min_tokens=1, max_tokens=3), num_tokens=num_tokens, adaptive=True, max_len=100_000
    )


def test_a_text_that_repeats_itself_is_guessed_deep_and_one_that_does_not_is_left_alone() -> None:
    loop = list(range(10)) * 200
    run = run_of(loop[:30], max_tokens=100_000)
    steps(lookup(), run, loop, per_row_s=0.0002, count=50)
    assert len(run.tokens) > 30 + 50 * 4
    rng = random.Random(2)
    noise = rng.choices(range(20), k=2000)
    run = run_of(noise[:100], max_tokens=100_000)
    rows = steps(lookup(), run, noise, per_row_s=0.002, count=300)
    assert rows < 300 * 1.25


def test_nothing_is_guessed_that_the_answer_has_no_room_for() -> None:
    loop = [1, 2, 3] * 50
    speculation = Speculation(
        PromptLookup(min_tokens=1, max_tokens=3), num_tokens=4, adaptive=False, max_len=100_000
    )
    run = run_of(loop[:30], max_tokens=3)
    turn = turn_of(run)
    speculation.plan([turn], lambda run, wanted: wanted, 100)
    assert turn.depth == 2
    run.tokens += loop[30:32]
    turn = turn_of(run)
    speculation.plan([turn], lambda run, wanted: wanted, 100)
    assert turn.depth == 0
