"""Weights that stay in four bits for small batches give what they stand for, to bfloat16's precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdserve.core.config import DType
from pdserve.models import ops_cpu
from pdserve.models.cpu_int4 import Int4Linear, int4_linear
from pdserve.models.cpu_linear import BySize, choose_products, make_integer_linear
from pdserve.models.ops import Workload
from pdserve.models.quantization.integers import IntWeight, stacked
from tests.support.engines import engine_for, prompt_of
from tests.support.quantisers import AwqQuantiser, GptqQuantiser, Quantiser, quantise_checkpoint
from tests.support.stepping import BlockDealer, greedy
from tests.support.tiny_models import TinyModel

# Activations, scales and offsets are each rounded to 8 bits (2 ** -9 at most); errors of many inputs average.
BFLOAT16_ERROR = 0.005


def integers(outputs: int = 48, inputs: int = 128, group: int = 32, bits: int = 4) -> IntWeight:
    generator = torch.Generator().manual_seed(outputs + inputs)
    top, groups = 2**bits, inputs // group
    return IntWeight(
        codes_OI=torch.randint(0, top, (outputs, inputs), dtype=torch.uint8, generator=generator),
        zeros_GO=torch.randint(0, top, (groups, outputs), dtype=torch.uint8, generator=generator),
        scales_GO=torch.rand(groups, outputs, generator=generator).add_(0.5).mul_(0.01).half(),
        group_of_I=None,
        bits=bits,
    )


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_a_four_bit_product_is_that_of_the_weight_multiplied_out(rows: int, group: int) -> None:
    weight, bias, x = integers(group=group), torch.randn(48), torch.randn(rows, 128)
    linear = int4_linear(weight, bias)
    assert isinstance(linear, Int4Linear)
    wanted = x @ weight.dequantised(torch.float32).t() + bias
    assert relative_error(linear(x), wanted) < BFLOAT16_ERROR


@pytest.mark.parametrize(
    "weight",
    [
        integers(outputs=40),
        integers(bits=2),
        integers(group=16),
        IntWeight(
            codes_OI=torch.zeros(48, 64, dtype=torch.uint8),
            zeros_GO=torch.zeros(2, 48, dtype=torch.uint8),
            scales_GO=torch.ones(2, 48),
            group_of_I=torch.arange(64) % 2,
            bits=4,
        ),
    ],
    ids=["outputs", "bits", "group", "act_order"],
)
def test_what_the_kernel_does_not_take_is_multiplied_out(weight: IntWeight) -> None:
    assert int4_linear(weight, None) is None
    outputs, inputs = weight.codes_OI.shape
    x = torch.randn(2, inputs)
    linear = make_integer_linear(weight, None, torch.bfloat16, Workload.ANY)
    wanted = x @ weight.dequantised(torch.float32).t()
    torch.testing.assert_close(linear(x), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max() + 1e-6))
    assert linear(x).shape == (2, outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_choose_by_batch_and_lose_nothing_either_way(dtype: torch.dtype) -> None:
    weight = integers(outputs=64, inputs=256)
    linear = make_integer_linear(weight, None, dtype, Workload.ANY)
    assert isinstance(linear, BySize)
    wanted_OI = weight.dequantised(torch.float32).t()
    for few_rows in (64, 3):
        linear.split_at(few_rows)
        for rows in (1, 3, 4, 70):
            x = torch.randn(rows, 256)
            assert relative_error(linear(x), x @ wanted_OI) < BFLOAT16_ERROR
    choose_products([linear])


def test_float32_models_and_prefill_workers_multiply_out() -> None:
    weight = integers()
    exact = make_integer_linear(weight, None, torch.float32, Workload.ANY)
    x = torch.randn(2, 128)
    torch.testing.assert_close(exact(x), x @ weight.dequantised(torch.float32).t(), rtol=1e-5, atol=1e-5)
    assert not isinstance(make_integer_linear(weight, None, torch.bfloat16, Workload.PREFILL), BySize)


def test_projections_are_stacked_only_where_their_groups_agree() -> None:
    one, other = integers(outputs=16), integers(outputs=32)
    both = stacked([one, other])
    assert both is not None
    wanted = torch.cat([one.dequantised(torch.float32), other.dequantised(torch.float32)])
    assert torch.equal(both.dequantised(torch.float32), wanted)
    assert stacked([one, integers(group=64)]) is None
    assert stacked([one, integers(bits=2)]) is None


@pytest.mark.parametrize("quantiser", [GptqQuantiser(group_size=32), AwqQuantiser(group_size=32)])
def test_a_model_in_four_bits_is_near_the_one_multiplied_out(
    quantiser: Quantiser,
    tiny_model: Callable[[str], TinyModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if measuring had found four bits faster for every batch: then nothing else is left.
    used: list[BySize] = []

    def always_few(linears: list[object]) -> None:
        used.extend(
            linear for linear in linears if isinstance(linear, BySize) and linear.form == "Int4Linear"
        )
        for linear in used:
            linear.split_at(64)

    monkeypatch.setattr(ops_cpu, "choose_products", always_few)
    source = tiny_model("four_bit_sizes").path
    quantise_checkpoint(source, tmp_path / "quantised", tmp_path / "plain", quantiser, lambda module: False)
    wanted, found = (
        sequence_logits(tmp_path / name, dtype)
        for name, dtype in (("plain", DType.FLOAT32), ("quantised", DType.BFLOAT16))
    )
    assert len(used) == 3 * 4
    assert relative_error(found, wanted) < 0.05


def sequence_logits(folder: Path, dtype: DType) -> torch.Tensor:
    engine = engine_for(folder, dtype)
    sequence = BlockDealer(engine).sequence(prompt_of(20), room=2)
    greedy(engine, sequence, 1, chunk=7)
    return torch.stack(sequence.logits[:20])
