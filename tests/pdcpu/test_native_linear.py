"""Products with packed weights: right for every size, and the same bits whatever else is multiplied."""

from __future__ import annotations

import pytest
import torch
from pdcpu.library import HelperCore, Library

from pdserve.models.cpu_native_linear import Arena, NativeLinear

SIZES = [(64, 64), (1, 1), (33, 7), (100, 80), (130, 2048), (192, 576)]


def linear_of(library: Library, weight: torch.Tensor, bias: torch.Tensor | None = None) -> NativeLinear:
    return NativeLinear(library, Arena(), weight, bias)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_weights_as_stored(
    library: Library, outputs: int, inputs: int, biased: bool
) -> None:
    weight = (torch.randn(outputs, inputs) * 0.05).bfloat16()
    bias = torch.randn(outputs).bfloat16() if biased else None
    linear = linear_of(library, weight, bias)
    for rows in (0, 1, 5, 17, 300):
        x = torch.randn(rows, inputs).bfloat16().float()
        want = x.double() @ weight.double().T
        if bias is not None:
            want += bias.double()
        # Sums of up to 2048 float32 products in one chain.
        torch.testing.assert_close(linear(x), want.float(), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("helpers", [0, 2])
def test_a_rows_result_has_the_same_bits_alone_and_among_others(library: Library, helpers: int) -> None:
    linear = linear_of(library, torch.randn(200, 576).bfloat16())
    x = torch.randn(300, 576)
    library.set_helpers([HelperCore(None)] * helpers)
    whole = linear(x)
    library.set_helpers([])
    for rows in (1, 2, 3, 5, 6, 7, 12, 13, 17, 64, 299):
        for first in (0, 1, 300 - rows):
            assert torch.equal(linear(x[first : first + rows]), whole[first : first + rows])


def test_strided_and_unaligned_inputs_are_read_as_they_lie(library: Library) -> None:
    weight = torch.randn(70, 2 * 48).bfloat16()[:, ::2]
    linear = linear_of(library, weight)
    x = torch.randn(9, 100)[:, 3:51]
    torch.testing.assert_close(linear(x), x.bfloat16().float() @ weight.float().T, rtol=1e-5, atol=1e-4)
    columns = torch.randn(48, 9).T
    assert torch.equal(linear(columns), linear(columns.contiguous()))


def test_numbers_that_are_none_reach_the_result(library: Library) -> None:
    weight = torch.randn(70, 40).bfloat16()
    weight[3, 5] = float("nan")
    y = linear_of(library, weight)(torch.randn(2, 40))
    assert bool(y[:, 3].isnan().all())
    assert bool(y[:, 4].isfinite().all())
    x = torch.randn(8, 40)
    x[6, 39] = float("nan")
    y = linear_of(library, torch.randn(70, 40).bfloat16())(x)
    assert bool(y[6].isnan().all())
    assert bool(y[7].isfinite().all())


def test_an_arena_gives_no_byte_twice() -> None:
    arena = Arena()
    parts = [arena.take(size) for size in (1, 63, 64, 65, 70 * 2**20, 5)]
    for value, part in enumerate(parts):
        part.fill_(value)
        assert part.data_ptr() % 64 == 0
    assert all(bool((part == value).all()) for value, part in enumerate(parts))
