"""Every family equals Hugging Face transformers in float32, through the paged pool."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdserve.core.config import DType
from pdserve.core.errors import MissingTensor, ShapeMismatch
from pdserve.models.checkpoint import Checkpoint, save_checkpoint
from tests.support.engines import BLOCK, check_reference, engine_for, prompt_of
from tests.support.paths import shared
from tests.support.stepping import BlockDealer, greedy, step
from tests.support.tiny_models import FAMILIES, TinyModel

# Sums of a few hundred float32 products in another order, through three layers.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}

TinyModels = Callable[[str], TinyModel]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(family: str, tiny_model: TinyModels) -> None:
    tiny = tiny_model(family)
    engine = engine_for(tiny.path)
    for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3):
        dealer = BlockDealer(engine, seed=length)
        sequence = dealer.sequence(prompt_of(length), room=12)
        tokens = greedy(engine, sequence, new_tokens=12, chunk=13)
        want = tiny.logits(sequence.tokens[:-1])
        torch.testing.assert_close(torch.stack(sequence.logits), want, **TOLERANCE)
        assert tokens == want.argmax(-1)[length - 1 :].tolist()


@pytest.mark.parametrize("family", ["llama32_tied_llama3_rope", "mistral_sliding_window", "qwen3_qk_norm"])
def test_prefill_chunks_and_decodes_share_a_step(family: str, tiny_model: TinyModels) -> None:
    tiny = tiny_model(family)
    engine = engine_for(tiny.path)
    dealer = BlockDealer(engine)
    rng = random.Random(5)
    sequences = [dealer.sequence(prompt_of(n, seed=n)) for n in (1, 60, 17, 3, 41, 9, 33)]
    while pending := [s for s in sequences if s.done < len(s.tokens)]:
        parts = [(s, min(rng.choice([1, 1, 2, 7, 16, 25]), len(s.tokens) - s.done)) for s in pending]
        rng.shuffle(parts)
        step(engine, parts)
    for sequence in sequences:
        torch.testing.assert_close(torch.stack(sequence.logits), tiny.logits(sequence.tokens), **TOLERANCE)


@pytest.mark.parametrize("block", [1, 16, 64])
def test_the_block_size_changes_nothing(block: int, tiny_model: TinyModels) -> None:
    tiny = tiny_model("qwen2_qkv_bias")
    engine = engine_for(tiny.path, block=block, blocks=70)
    sequence = BlockDealer(engine).sequence(prompt_of(37), room=8)
    greedy(engine, sequence, new_tokens=8, chunk=16)
    torch.testing.assert_close(torch.stack(sequence.logits), tiny.logits(sequence.tokens[:-1]), **TOLERANCE)


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_lower_precision_stays_near_float32(dtype: DType, tiny_model: TinyModels) -> None:
    tiny = tiny_model("llama2_no_gqa")
    engine = engine_for(tiny.path, dtype)
    assert engine.fingerprint.layouts[0].group.dtype == dtype.value
    sequence = BlockDealer(engine).sequence(prompt_of(30), room=8)
    greedy(engine, sequence, new_tokens=8, chunk=16)
    want = tiny.logits(sequence.tokens[:-1])
    error = (torch.stack(sequence.logits) - want).norm() / want.norm()
    # The weights are rounded too: bfloat16 keeps 8 bits, float16 11, and three layers add up to some ulps.
    assert error < (0.06 if dtype is DType.BFLOAT16 else 0.0075)


def test_stale_bytes_in_other_blocks_and_behind_the_context_are_not_seen(tiny_model: TinyModels) -> None:
    tiny = tiny_model("llama2_no_gqa")
    engine = engine_for(tiny.path)
    engine.runner.pools[0].tensor.fill_(1e4)
    sequence = BlockDealer(engine).sequence(prompt_of(BLOCK + 3), room=6)
    greedy(engine, sequence, new_tokens=6, chunk=5)
    torch.testing.assert_close(torch.stack(sequence.logits), tiny.logits(sequence.tokens[:-1]), **TOLERANCE)


def test_a_missing_tensor_and_a_wrong_shape_are_named(tiny_model: TinyModels, tmp_path: Path) -> None:
    source = tiny_model("qwen2_qkv_bias").path
    config = json.loads((source / "config.json").read_text())
    with Checkpoint.open(source) as checkpoint:
        tensors = {name: checkpoint.get(name).clone() for name in checkpoint.names}
    bias = "model.layers.1.self_attn.k_proj.bias"
    cut = {**tensors, bias: tensors[bias][:-1]}
    save_checkpoint(tmp_path / "cut", config, cut)
    with pytest.raises(ShapeMismatch, match=r"layers\.1\.self_attn\.k_proj\.bias.*\[15\].*\[16\]"):
        engine_for(tmp_path / "cut")
    del cut[bias]
    save_checkpoint(tmp_path / "missing", config, cut)
    with pytest.raises(MissingTensor, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        engine_for(tmp_path / "missing")


def test_a_trained_model_gives_its_reference_answers() -> None:
    folder = shared("models/stories15M")
    check_reference(engine_for(folder, block=64, blocks=8), folder / "reference.json", max_tokens=40)


@pytest.mark.network_package
def test_the_default_model_gives_its_reference_answers() -> None:
    store = pytest.importorskip("pdserve.models.store")
    reference = shared("models/SmolLM2-135M-Instruct/reference.json")
    folder = store.resolve("SmolLM2-135M-Instruct")
    check_reference(engine_for(folder, block=64, blocks=8), reference, max_tokens=12)
