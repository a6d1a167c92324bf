"""SwiGLU kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import activation as reference

from tests.support.kernels import assert_close

activation = pytest.importorskip("pdkernels.activation", exc_type=ImportError)


@pytest.mark.parametrize(("tokens", "width"), [(0, 4), (4, 0), (1, 1), (3, 1536), (9, 1025)])
def test_silu_mul_is_the_reference(device: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = (torch.randn(tokens, 2 * width, device=device) * 4).to(dtype)
    assert_close(activation.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_mul_reads_rows_with_a_stride(device: str) -> None:
    gate_up = torch.randn(6, 40, device=device)[::2, 4:36]
    assert_close(activation.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.filterwarnings("ignore:overflow")  # of exp, by the interpreter's numpy
def test_large_gates_neither_overflow_nor_become_nan(device: str) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=device)
    wanted = torch.tensor([[-0.0, 3e4, 0.0]], device=device)
    assert torch.equal(activation.silu_mul(gate_up), wanted)


def test_an_odd_width_is_refused(device: str) -> None:
    with pytest.raises(KernelInputError):
        activation.silu_mul(torch.randn(2, 5, device=device))
