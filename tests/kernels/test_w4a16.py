"""The product with 4-bit weights against its reference, and the packing it works on."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import w4a16 as reference

from tests.support.kernels import assert_close

w4a16 = pytest.importorskip("pdkernels.w4a16", exc_type=ImportError)
split_k = pytest.importorskip("pdkernels.split_k", exc_type=ImportError)


def weights(
    outputs: int, inputs: int, group: int, device: str, zero: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=device)
    shape = (inputs // group, outputs)
    zeros = torch.randint(0, 16, shape, dtype=torch.uint8, device=device)
    scales = (torch.rand(shape, device=device) + 0.5) * (0.1 * inputs**-0.5)
    return codes, zeros if zero is None else torch.full_like(zeros, zero), scales.half()


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [
        (1, 64, 128, 128),
        (3, 72, 288, 32),
        (17, 130, 512, 64),
        (70, 96, 384, 128),
        (2, 33, 96, 96),
        (5, 40, 48, 16),
        (4, 24, 320, 320),
    ],
)
@pytest.mark.parametrize("zero", [None, 8])
def test_the_product_is_that_of_the_weights_multiplied_out(
    device: str, dtype: torch.dtype, rows: int, outputs: int, inputs: int, group: int, zero: int | None
) -> None:
    codes, zeros, scales = weights(outputs, inputs, group, device, zero)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype) if zero is None else None
    packed = w4a16.pack_w4(codes, zeros, scales)
    assert (packed.zeros_GO is None) == (zero is not None)
    assert_close(
        w4a16.w4_matmul(x, packed, bias), reference.w4_matmul(x, codes, zeros, scales, bias), scale=4
    )


@pytest.mark.parametrize("per_split", [1, 3, 100])
def test_however_the_inputs_are_split_the_product_is_the_same(
    device: str, per_split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w4a16, "iterations_per_split", lambda *_: per_split)
    codes, zeros, scales = weights(80, 448, 32, device)
    x, bias = torch.randn(3, 448, device=device), torch.randn(80, device=device)
    found = w4a16.w4_matmul(x, w4a16.pack_w4(codes, zeros, scales), bias)
    assert_close(found, reference.w4_matmul(x, codes, zeros, scales, bias), scale=4)


def test_few_tiles_are_split_and_many_are_not() -> None:
    device = torch.device("cpu")  # stands for 16 programs at once
    assert split_k.iterations_per_split(2, 64, device) == 8
    assert split_k.iterations_per_split(16, 64, device) == 64
    assert split_k.iterations_per_split(1, 5, device) == split_k.LEAST_ITERATIONS
    assert split_k.iterations_per_split(1, 2, device) == 2


def test_a_code_takes_half_a_byte() -> None:
    codes, zeros, scales = weights(64, 1024, 128, "cpu")
    assert w4a16.pack_w4(codes, zeros, scales).packed_JOH.nbytes == 64 * 1024 // 2


def test_x_may_be_cut_from_wider_rows_and_have_none(device: str) -> None:
    codes, zeros, scales = weights(48, 64, 32, device)
    packed = w4a16.pack_w4(codes, zeros, scales)
    x = torch.randn(6, 80, device=device)[::2, 8:72]
    assert_close(w4a16.w4_matmul(x, packed), reference.w4_matmul(x, codes, zeros, scales), scale=4)
    assert w4a16.w4_matmul(x[:0], packed).shape == (0, 48)


@pytest.mark.parametrize("group", [8, 24, 20])
def test_groups_that_no_tile_divides_are_refused(group: int) -> None:
    codes, zeros, scales = weights(16, group * 4, group, "cpu")
    with pytest.raises(KernelInputError, match="16"):
        w4a16.pack_w4(codes, zeros, scales)


@pytest.mark.parametrize("case", ["inputs", "bias", "strided"])
def test_arguments_that_do_not_fit_are_refused(device: str, case: str) -> None:
    packed = w4a16.pack_w4(*weights(32, 64, 32, device))
    x, bias = torch.zeros(2, 64, device=device), torch.zeros(32, device=device)
    if case == "inputs":
        x = x[:, :32]
    elif case == "strided":
        x = torch.zeros(64, 2, device=device).t()
    else:
        bias = bias.half()
    with pytest.raises(KernelInputError):
        w4a16.w4_matmul(x, packed, bias)
