"""Sampling kernels against a sort in torch and against the engine's random numbers."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import sampling as reference
from torch import Tensor

from pdserve.engine.philox import uniform

sampling = pytest.importorskip("pdkernels.sampling", exc_type=ImportError)

Row = tuple[float, int, float, float, int, int]
"""temperature, top_k, top_p, min_p, seed, position."""


def params_of(rows: list[Row], device: str) -> sampling.DrawParams:
    def column(index: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row[index] for row in rows], dtype=dtype, device=device)

    return sampling.DrawParams(
        temperature_N=column(0, torch.float32),
        top_k_N=column(1, torch.int32),
        top_p_N=column(2, torch.float32),
        min_p_N=column(3, torch.float32),
        seed_N=column(4, torch.int64),
        position_N=column(5, torch.int64),
    )


def reference_token(logits_V: Tensor, row: Row) -> int:
    temperature, top_k, top_p, min_p, seed, position = row
    if temperature == 0.0:
        return int(logits_V.argmax())
    weights = reference.kept_weights(logits_V.cpu().clone(), temperature, top_k, top_p, min_p)
    return reference.draw(weights, reference.uniform(seed, position))


def test_the_reference_draws_the_engines_numbers() -> None:
    for seed, position in [(0, 0), (1, 7), (2**63 - 1, 2**40 + 3)]:
        assert reference.uniform(seed, position) == uniform(seed, position)


@pytest.mark.parametrize("vocab", [1, 7, 1000, 4096, 4099])
def test_tokens_are_those_of_the_reference(device: str, vocab: int) -> None:
    settings = [
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.0),
        (0.7, 1, 1.0, 0.0),
        (1.5, 5, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (1.0, 50, 0.9, 0.0),
        (2.0, 0, 0.95, 0.05),
        (0.3, 4000, 0.01, 0.0),
    ]
    rows: list[Row] = [
        (*setting, 12345678901234567 * i, 17 + 2**33 * (i % 2)) for i, setting in enumerate(settings)
    ]
    logits = torch.randn(len(rows), vocab + 3, device=device)[:, :vocab] * 3
    before = logits.clone()
    tokens, valid = sampling.sample(logits, params_of(rows, device))
    assert tokens.tolist() == [reference_token(logits[i], row) for i, row in enumerate(rows)]
    assert valid.tolist() == [1] * len(rows)
    assert torch.equal(logits, before)


def test_a_distribution_is_met_over_many_positions(device: str) -> None:
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    draws = 150
    rows: list[Row] = [(1.0, 0, 1.0, 0.0, 99, position) for position in range(draws)]
    tokens, _ = sampling.sample(weights.log().to(device).expand(draws, 4), params_of(rows, device))
    found = torch.bincount(tokens.cpu(), minlength=4) / draws
    # Five standard deviations of a binomial share: the seed is fixed, so this never flickers.
    assert torch.all((found - weights).abs() < 5 * (weights * (1 - weights) / draws).sqrt())


def test_only_kept_tokens_are_ever_drawn(device: str) -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.0, -1.0, 0.0]], device=device)
    for setting, allowed in {
        (1.0, 1, 1.0, 0.0): {0, 2},  # ties with the best stay
        (1.0, 3, 1.0, 0.0): {0, 2, 3},
        (1.0, 0, 0.5, 0.0): {0, 2},
        (1.0, 0, 1.0, 0.3): {0, 2, 3},
    }.items():
        rows: list[Row] = [(*setting, seed, 3) for seed in range(12)]
        tokens, _ = sampling.sample(logits.expand(12, 6), params_of(rows, device))
        assert set(tokens.tolist()) == allowed


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    logits = torch.randn(5, 300, device=device)
    rows: list[Row] = [(1.0, 20 * i, 0.9, 0.0, i, 5) for i in range(5)]
    together, _ = sampling.sample(logits, params_of(rows, device))
    alone = [sampling.sample(logits[i : i + 1], params_of(rows[i : i + 1], device))[0] for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_rows_without_a_valid_token_are_marked_and_disturb_no_other(device: str) -> None:
    logits = torch.randn(5, 50, device=device)
    logits[0, 3] = float("nan")
    logits[1] = float("-inf")
    logits[2, 4] = float("inf")
    logits[3, 1:] = float("-inf")
    for temperature in (0.0, 1.0):
        rows: list[Row] = [(temperature, 2, 0.9, 0.0, 1, 1)] * 5
        tokens, valid = sampling.sample(logits, params_of(rows, device))
        assert valid.tolist() == [0, 0, 0, 1, 1]
        assert tokens[3] == 0
        assert tokens[4] == reference_token(logits[4], rows[4])


def test_ties_go_to_the_lowest_id_when_greedy(device: str) -> None:
    logits = torch.zeros(1, 9000, device=device)
    logits[0, [4100, 4095, 8500]] = 1.0
    tokens, _ = sampling.sample(logits, params_of([(0.0, 0, 1.0, 0.0, 0, 0)], device))
    assert tokens.tolist() == [4095]


def test_a_tiny_temperature_takes_the_best_token(device: str) -> None:
    logits = torch.randn(1, 100, device=device)
    tokens, _ = sampling.sample(logits, params_of([(1e-6, 0, 1.0, 0.0, 3, 4)], device))
    assert tokens.item() == logits.argmax()


def test_adjustments_apply_bias_then_repetition_then_subtraction(device: str) -> None:
    logits = torch.randn(3, 300, device=device)
    wanted = logits.clone()
    entries = [(r, t, 0.5 * r - 0.4, 1.0 + 0.1 * (t % 3), 0.25 * (t % 2)) for r in (0, 2) for t in range(150)]
    entries.append((1, 299, float("-inf"), 1.3, 0.0))
    for row, token, bias, repetition, subtract in entries:
        value = wanted[row, token] + bias
        wanted[row, token] = (value / repetition if value > 0 else value * repetition) - subtract
    columns = list(zip(*entries, strict=True))

    def put(index: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor(columns[index], dtype=dtype, device=device)

    sampling.adjust_logits(
        logits,
        sampling.Adjustments(
            rows_X=put(0, torch.int32),
            tokens_X=put(1, torch.int32),
            bias_X=put(2, torch.float32),
            repetition_X=put(3, torch.float32),
            subtract_X=put(4, torch.float32),
        ),
    )
    torch.testing.assert_close(logits, wanted)


def test_inputs_a_kernel_cannot_take_are_named(device: str) -> None:
    logits = torch.randn(2, 10, device=device)
    two: list[Row] = [(1.0, 0, 1.0, 0.0, 0, 0)] * 2
    for argument, args in {
        "logits": (logits.half(), params_of(two, device)),
        "temperature_N": (logits, params_of(two[:1], device)),
    }.items():
        with pytest.raises(KernelInputError) as error:
            sampling.sample(*args)
        assert error.value.argument == argument
