"""Every way to multiply on a CPU gives the product of the same weights."""

from __future__ import annotations

import pytest
import torch

from pdserve.models.cpu_linear import (
    PROBED_ROWS,
    BySize,
    HalfLinear,
    PlainLinear,
    choose_products,
    make_head,
    make_linear,
)
from pdserve.models.ops import Workload


def weight(dtype: torch.dtype, outputs: int = 96, inputs: int = 80, scale: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(outputs, inputs, generator=generator) * scale).to(dtype)


def exact(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.double() @ w.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("rows", [1, 3, 4, 17])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_the_weights_as_stored(dtype: torch.dtype, biased: bool, rows: int) -> None:
    w = weight(dtype)
    bias = torch.randn(w.shape[0]).to(dtype) if biased else None
    # Activations that bfloat16 holds exactly: what is left is the sum, and the result rounded once.
    x = torch.randn(rows, w.shape[1]).bfloat16().float()
    before = w.clone()
    y = make_linear(w, bias, Workload.ANY)(x)
    assert torch.equal(w, before)
    assert y.dtype == torch.float32
    rounded = dtype is torch.bfloat16 and rows > 3
    want = exact(x, w, bias).float()
    torch.testing.assert_close(y, want, rtol=2**-8 if rounded else 2e-5, atol=1e-2 if rounded else 1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_float16_copies_lose_nothing_at_any_scale(scale: float) -> None:
    w = weight(torch.bfloat16, scale=scale)
    linear = make_linear(w, None, Workload.ANY)
    assert isinstance(linear, BySize)
    x = torch.randn(1, w.shape[1])
    torch.testing.assert_close(linear(x), exact(x, w, None).float(), rtol=1e-5, atol=1e-5 * scale)


def test_float32_weights_are_halved_only_where_nothing_is_lost() -> None:
    assert isinstance(make_linear(weight(torch.bfloat16).float(), None, Workload.ANY), HalfLinear)
    assert isinstance(make_linear(weight(torch.float32), None, Workload.ANY), PlainLinear)


def test_weights_of_zero_or_beyond_numbers_still_multiply() -> None:
    x = torch.randn(2, 80)
    assert not make_linear(torch.zeros(96, 80, dtype=torch.bfloat16), None, Workload.ANY)(x).any()
    broken = weight(torch.bfloat16)
    broken[3, 5] = float("nan")
    y = make_linear(broken, None, Workload.ANY)(x)
    assert bool(y[:, 3].isnan().all())
    assert bool(y[:, 4].isfinite().all())


def test_a_prefill_worker_keeps_its_weights_once() -> None:
    assert not isinstance(make_linear(weight(torch.bfloat16), None, Workload.PREFILL), BySize)


def test_measuring_changes_speed_and_not_results() -> None:
    w = weight(torch.bfloat16)
    linears = [make_linear(w, None, Workload.ANY) for _ in range(3)]
    choose_products(linears)
    for linear in linears:
        assert isinstance(linear, BySize)
        assert 0 <= linear.few_rows <= PROBED_ROWS[-1]
        for rows in (1, 5, 70):
            x = torch.randn(rows, 80)
            torch.testing.assert_close(linear(x), exact(x, w, None).float(), rtol=0.02, atol=0.03)


@pytest.mark.parametrize("few_rows", [0, 4, PROBED_ROWS[-1]])
def test_any_split_multiplies_every_batch(few_rows: int) -> None:
    w = weight(torch.bfloat16)
    linear = make_linear(w, None, Workload.ANY)
    assert isinstance(linear, BySize)
    linear.split_at(few_rows)
    for rows in (1, 4, 5, 80):
        x = torch.randn(rows, 80)
        torch.testing.assert_close(linear(x), exact(x, w, None).float(), rtol=0.02, atol=0.03)


def test_logits_do_not_depend_on_how_many_rows_a_step_has() -> None:
    weight = torch.randn(300, 64).bfloat16()
    head, x = make_head(weight), torch.randn(40, 64)
    alone = torch.cat([head(row[None]) for row in x])
    assert torch.equal(head(x), alone)
    torch.testing.assert_close(alone, x @ weight.float().T, rtol=1e-5, atol=1e-4)
