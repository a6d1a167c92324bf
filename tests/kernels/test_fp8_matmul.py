"""The product with FP8 weights against its reference, with the conversion of the GPU and without."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import fp8_matmul as reference

from tests.support.kernels import assert_close

fp8 = pytest.importorskip("pdkernels.fp8_matmul", exc_type=ImportError)
tuning = pytest.importorskip("pdkernels.tuning")


def matrix(outputs: int, inputs: int, tall: int, wide: int, device: str) -> fp8.Fp8Matrix:
    codes = (torch.randn(outputs, inputs, device=device) * 40).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = (-(-outputs // tall), -(-inputs // wide))
    scales = (torch.rand(shape, device=device) + 0.5) * (inputs**-0.5 / 40)
    return fp8.Fp8Matrix(codes_OI=codes, scales_RK=scales, tall=tall, wide=wide)


def wanted(x: torch.Tensor, weight: fp8.Fp8Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    return reference.fp8_matmul(x, weight.codes_OI, weight.scales_RK, weight.tall, weight.wide, bias)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tall", "wide"),
    [
        (1, 64, 256, 64, 256),
        (3, 72, 288, 1, 288),
        (17, 300, 320, 128, 128),
        (70, 96, 192, 32, 64),
        (2, 33, 100, 33, 16),
    ],
)
@pytest.mark.parametrize("capability", [9, 8])
def test_the_product_is_that_of_the_weights_multiplied_out(
    device: str,
    dtype: torch.dtype,
    rows: int,
    outputs: int,
    inputs: int,
    tall: int,
    wide: int,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capability == 8:  # without the GPU's own conversion, on any GPU
        monkeypatch.setattr(fp8, "has_fp8", lambda _: False)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    bias = torch.randn(outputs, device=device).to(dtype) if rows != 1 else None
    weight = matrix(outputs, inputs, tall, wide, device)
    assert_close(fp8.fp8_matmul(x, weight, bias), wanted(x, weight, bias), scale=4)


@pytest.mark.parametrize("native", [True, False])
def test_every_number_of_the_format_is_read_exactly(
    device: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "has_fp8", lambda _: native)
    bits = torch.arange(256, dtype=torch.uint8, device=device)
    codes = bits[(bits & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    weight = fp8.Fp8Matrix(
        codes_OI=codes[:, None].repeat(1, 16).contiguous(),
        scales_RK=torch.ones(1, 1, device=device),
        tall=254,
        wide=16,
    )
    one = torch.zeros(1, 16, device=device)
    one[0, 3] = 1.0
    assert torch.equal(fp8.fp8_matmul(one, weight)[0], codes.float())


@pytest.mark.parametrize("per_split", [1, 2, 100])
def test_however_the_inputs_are_split_the_product_is_the_same(
    device: str, per_split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "iterations_per_split", lambda *_: per_split)
    weight = matrix(80, 448, 128, 128, device)
    x, bias = torch.randn(3, 448, device=device), torch.randn(80, device=device)
    assert_close(fp8.fp8_matmul(x, weight, bias), wanted(x, weight, bias), scale=4)


def test_x_may_be_cut_from_wider_rows_and_have_none(device: str) -> None:
    weight = matrix(48, 64, 48, 64, device)
    x = torch.randn(6, 80, device=device)[::2, 8:72]
    assert_close(fp8.fp8_matmul(x, weight), wanted(x, weight), scale=4)
    assert fp8.fp8_matmul(x[:0], weight).shape == (0, 48)


@pytest.mark.parametrize("case", ["inputs", "bias", "dtype", "blocks", "scales"])
def test_arguments_that_do_not_fit_are_refused(device: str, case: str) -> None:
    weight = matrix(32, 64, 8, 20 if case == "blocks" else 32, device)
    x, bias = torch.zeros(2, 64, device=device), torch.zeros(32, device=device)
    codes, scales = weight.codes_OI, weight.scales_RK
    match case:
        case "inputs":
            x = x[:, :32]
        case "bias":
            bias = bias.half()
        case "dtype":
            codes = codes.float()
        case "scales":
            scales = scales[:2]
    found = fp8.Fp8Matrix(codes_OI=codes, scales_RK=scales, tall=weight.tall, wide=weight.wide)
    with pytest.raises(KernelInputError):
        fp8.fp8_matmul(x, found, bias)
