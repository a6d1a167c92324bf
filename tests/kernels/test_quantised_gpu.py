"""Quantised checkpoints on the Triton operations: weights stay small, logits are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdserve.core.ids import BlockId
from pdserve.models.checkpoint import Checkpoint
from pdserve.models.hf_config import read_config
from pdserve.models.llama import LlamaModel
from pdserve.models.ops import ModelOps, SliceMeta
from pdserve.models.ops_cpu import CpuOps
from pdserve.models.quantization.integers import IntWeight
from pdserve.models.quantization.view import DequantisedView
from pdserve.models.weights import load_llama
from tests.support.paths import shared

ops_triton = pytest.importorskip("pdserve.models.ops_triton", exc_type=ImportError)
gpu_linear = pytest.importorskip("pdserve.models.gpu_linear", exc_type=ImportError)

BLOCK_TOKENS = 16


def load(folder: Path, make: Callable[..., ModelOps], device: str) -> LlamaModel:
    config, target = read_config(folder), torch.device(device)
    assert config.quantization is not None
    ops = make(config, target, 64)
    dtype = getattr(torch, config.dtype)
    with Checkpoint.open(folder) as checkpoint:
        view = DequantisedView(checkpoint, config.quantization, dtype)
        return load_llama(config, view, ops, dtype=dtype, device=target, progress=lambda *_: None)


@torch.inference_mode()
def logits(model: LlamaModel, device: str) -> Tensor:
    c = model.config
    shape = (2, c.num_layers, 2, c.num_kv_heads, BLOCK_TOKENS, c.head_dim)
    model.ops.bind_pool(torch.zeros(shape, dtype=getattr(torch, c.dtype), device=device))
    tokens = torch.tensor([1, 9038, 2501, 263, 931], device=device)
    metas = [SliceMeta(offset=0, length=5, start=0, blocks=[BlockId(1)])]
    return model.forward(tokens, metas, None, layer_groups=1, on_layers_done=None).cpu()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["awq-int4", "gptq-int4", "fp8-block"])
def test_a_published_checkpoint_gives_the_logits_of_the_cpu(device: str, kind: str) -> None:
    folder = shared(f"models/stories15M-{kind}")
    model = load(folder, ops_triton.TritonOps, device)
    small = gpu_linear.Fp8Linear if kind == "fp8-block" else gpu_linear.Int4Linear
    for layer in model.layers:
        assert isinstance(layer.qkv, small)
        assert isinstance(layer.mlp.down, small)
    wanted = logits(load(folder, CpuOps, "cpu"), "cpu")
    found = logits(model, device)
    # float16 activations against float32 ones, over six layers; logits are up to 20.
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=8e-2)
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def int_weight(group_of: Tensor | None, inputs: int = 64, groups: int = 4, bits: int = 4) -> IntWeight:
    return IntWeight(
        codes_OI=torch.randint(0, 2**bits, (24, inputs), dtype=torch.uint8),
        zeros_GO=torch.randint(0, 2**bits, (groups, 24), dtype=torch.uint8),
        scales_GO=torch.rand(groups, 24) * 0.1,
        group_of_I=group_of,
        bits=bits,
    )


@pytest.mark.parametrize("bits", [4, 2])
def test_scattered_groups_of_act_order_are_put_in_order(device: str, bits: int) -> None:
    weight = int_weight(torch.arange(64)[torch.randperm(64)] // 16, bits=bits)
    made = gpu_linear.int4_linear(weight, None, torch.device(device))
    assert made is not None
    x = torch.randn(3, 64)
    torch.testing.assert_close(
        made(x.to(device)).cpu(), x @ weight.dequantised(torch.float32).t(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "weight",
    [
        int_weight(torch.arange(70) // 16, inputs=70, groups=5),
        int_weight(None, inputs=32),
        int_weight(None, bits=8),
    ],
    ids=["a smaller last group", "groups of 8", "8 bits"],
)
def test_what_the_kernel_does_not_take_is_multiplied_out_at_load(device: str, weight: IntWeight) -> None:
    assert gpu_linear.int4_linear(weight, None, torch.device(device)) is None
    inputs = weight.codes_OI.shape[1]
    x = torch.randn(2, inputs)
    folder = shared("models/stories15M")
    ops = ops_triton.TritonOps(read_config(folder), torch.device(device), 64)
    found = ops.integer_linear(weight, None)(x.half().to(device))
    wanted = x @ weight.dequantised(torch.float32).t()
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=1e-2, atol=2e-2)
