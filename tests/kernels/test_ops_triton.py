"""The Triton operations drive a whole model through prefill, chunks and mixed steps like the CPU ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.core.ids import BlockId
from pdserve.models.config import ModelConfig, MoeConfig, RopeConfig
from pdserve.models.llama import LlamaModel
from pdserve.models.ops import ModelOps, SliceMeta
from pdserve.models.ops_cpu import CpuOps
from pdserve.models.weights import DummySource, load_llama

ops_triton = pytest.importorskip("pdserve.models.ops_triton", exc_type=ImportError)

PLAIN = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    max_position=256,
    tie_word_embeddings=False,
    dtype="float32",
)
FAMILIES = {
    "llama": PLAIN,
    "mistral, windowed": replace(PLAIN, sliding_window=9),
    "qwen2, biased": replace(PLAIN, qkv_bias=True, tie_word_embeddings=True),
    "qwen3, normed": replace(PLAIN, qk_norm=True, num_heads=4, num_kv_heads=4),
}
FAMILIES["mixture of experts"] = replace(
    PLAIN,
    moe=MoeConfig(num_experts=5, experts_per_token=2, intermediate_size=24, normalised=True, layers=(1,)),
)
BLOCK_TOKENS = 8
TABLES = [[BlockId(b) for b in blocks] for blocks in ([7, 2, 9, 4, 0, 5], [1, 8, 3], [6, 10])]
# (sequence, start, length) of each step: chunked prefills, then decode mixed with a late prefill.
STEPS = [
    [(0, 0, 21)],
    [(0, 21, 12), (1, 0, 7)],
    [(0, 33, 1), (1, 7, 1), (2, 0, 5)],
    [(2, 5, 1), (0, 34, 1), (1, 8, 1)],
]
PROMPTS = torch.randint(0, 97, (3, 64), generator=torch.Generator().manual_seed(5))


def logits_of_steps(config: ModelConfig, ops: ModelOps, device: str, *, empty: float) -> list[Tensor]:
    """`empty` fills the pool first."""
    dtype = getattr(torch, config.dtype)
    model: LlamaModel = load_llama(
        config, DummySource(dtype), ops, dtype=dtype, device=torch.device(device), progress=lambda *_: None
    )
    shape = (11, config.num_layers, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
    ops.bind_pool(torch.full(shape, empty, dtype=dtype, device=device))
    return [run_step(model, step, device) for step in STEPS]


@torch.inference_mode()
def run_step(model: LlamaModel, step: list[tuple[int, int, int]], device: str) -> Tensor:
    offsets = [0, *itertools.accumulate(length for _, _, length in step)]
    metas = [
        SliceMeta(offset=offset, length=length, start=start, blocks=TABLES[seq])
        for (seq, start, length), offset in zip(step, offsets, strict=False)
    ]
    tokens = torch.cat([PROMPTS[seq, start : start + length] for seq, start, length in step])
    return model.forward(tokens.to(device), metas, None, layer_groups=1, on_layers_done=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_step_are_those_of_the_cpu_operations(device: str, name: str) -> None:
    config = FAMILIES[name]
    cpu, target = torch.device("cpu"), torch.device(device)
    wanted = logits_of_steps(config, CpuOps(config, cpu, 64), "cpu", empty=0.0)
    # What no token wrote must never show.
    ops = ops_triton.TritonOps(config, target, 64)
    found = logits_of_steps(config, ops, device, empty=float("nan"))
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert not theirs.isnan().any()
        # Two layers of fp32 products in another order; logits are around 0.1.
        torch.testing.assert_close(
            ours.cpu(), theirs, rtol=1e-4, atol=1e-5, msg=lambda m, s=step: f"{s}: {m}"
        )


def test_a_chunked_prompt_gives_the_logits_of_the_whole_prompt(device: str) -> None:
    config, target = PLAIN, torch.device(device)

    def run(steps: list[tuple[int, int, int]]) -> Tensor:
        ops = ops_triton.TritonOps(config, target, 64)
        source = DummySource(torch.float32)
        model = load_llama(config, source, ops, dtype=torch.float32, device=target, progress=lambda *_: None)
        ops.bind_pool(torch.full((11, 2, 2, 2, BLOCK_TOKENS, 16), float("nan"), device=device))
        return torch.cat([run_step(model, [step], device) for step in steps])

    torch.testing.assert_close(run([(0, 0, 11), (0, 11, 9), (0, 20, 1)]), run([(0, 0, 21)]))


def test_a_pool_of_another_dtype_is_refused(device: str) -> None:
    ops = ops_triton.TritonOps(PLAIN, torch.device(device), 64)
    with pytest.raises(ConfigError, match="float16"):
        ops.bind_pool(torch.zeros(1, 2, 2, 2, 8, 16, dtype=torch.float16, device=device))
