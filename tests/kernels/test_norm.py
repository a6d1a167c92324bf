"""RMSNorm kernels against their reference."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import norm as reference

from tests.support.kernels import assert_close

norm = pytest.importorskip("pdkernels.norm", exc_type=ImportError)


@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (3, 576), (5, 2048), (33, 17), (2, 4100)])
def test_rms_norm_is_the_reference(device: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, device=device).to(dtype) * 3
    weight = torch.randn(width, device=device).to(dtype)
    assert_close(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def test_rms_norm_per_head_reads_a_strided_slice_of_the_fused_projection(
    device: str, dtype: torch.dtype
) -> None:
    qkv = torch.randn(7, 5, 128, device=device).to(dtype)
    weight = torch.randn(128, device=device).to(dtype)
    for heads in (qkv[:, :3], qkv[:, 3:4], qkv[::2]):
        assert_close(norm.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))


def test_eps_keeps_a_row_of_zeros_at_zero(device: str) -> None:
    out = norm.rms_norm(torch.zeros(2, 64, device=device), torch.ones(64, device=device), 1e-5)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (3, 576), (2, 2048)])
def test_add_rms_norm_updates_the_residual_exactly_and_norms_it(
    device: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    wide = torch.randn(tokens, width + 6, device=device).to(dtype)
    x = wide[:, 2 : width + 2]
    residual = torch.randn(tokens, width, device=device).to(dtype)
    wanted_residual = residual.clone()
    weight = torch.randn(width, device=device).to(dtype)
    wanted = reference.add_rms_norm(x, wanted_residual, weight, 1e-5)
    out = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, wanted_residual)
    assert_close(out, wanted)


def test_inputs_a_kernel_cannot_take_are_named(device: str) -> None:
    x = torch.randn(4, 8, device=device)
    weight = torch.ones(8, device=device)
    for bad_x, bad_weight, argument in [
        (x[:, ::2], weight[:4], "x"),
        (x.double(), weight.double(), "x"),
        (x, weight[:7], "weight"),
        (x, weight.half(), "weight"),
        (x[0], weight, "x"),
    ]:
        with pytest.raises(KernelInputError) as error:
            norm.rms_norm(bad_x, bad_weight, 1e-5)
        assert error.value.argument == argument
    with pytest.raises(KernelInputError):
        norm.add_rms_norm(x, x[:3], weight, 1e-5)
