"""Whole models in bfloat16 on the kernels: near transformers, and independent of batch and chunking."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pdcpu.library import HelperCore, Library
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pdserve.core.config import DType
from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.engine.build import Engine
from pdserve.models import cpu
from pdserve.models.cpu_native import NativeOps
from tests.support.engines import engine_for, prompt_of
from tests.support.stepping import BlockDealer, greedy, step
from tests.support.tiny_models import VOCAB, TinyModel, make_tiny_model_of

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "llama_heads_of_128": lambda: LlamaConfig(
        **{**COMMON, "head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1}
    ),
    "llama_no_gqa_odd_mlp": lambda: LlamaConfig(
        **{**COMMON, "head_dim": 96, "num_key_value_heads": 6, "intermediate_size": 80}
    ),
    "llama_biased": lambda: LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "mistral_window": lambda: MistralConfig(**COMMON, sliding_window=70),
    "qwen2_bias": lambda: Qwen2Config(**{**COMMON, "hidden_size": 192}),
    "qwen3_qk_norm": lambda: Qwen3Config(**{**COMMON, "head_dim": 64}),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    made: dict[str, TinyModel] = {}

    def get(family: str) -> TinyModel:
        if family not in made:
            made[family] = make_tiny_model_of(FAMILIES[family](), tmp_path_factory.mktemp(family))
            with torch.no_grad():  # what is left between the two is the rounding of activations
                for weight in made[family].oracle.parameters():
                    weight.copy_(weight.bfloat16())
        return made[family]

    return get


@pytest.fixture
def native(library: Library, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Engines in bfloat16 on the library of this test."""
    monkeypatch.setattr(cpu, "load", lambda: library)

    def make(path: Path, block: int = 8) -> Engine:
        engine = engine_for(path, DType.BFLOAT16, blocks=80 * 8 // block, block=block)
        assert isinstance(engine.runner._model.ops, NativeOps)
        return engine

    return make


def rows_of(engine: Engine, prompt: list[int], chunk: int, seed: int = 0) -> torch.Tensor:
    sequence = BlockDealer(engine, seed).sequence(prompt)
    while sequence.done < len(prompt):
        step(engine, [(sequence, min(chunk, len(prompt) - sequence.done))])
    return torch.stack(sequence.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_near_float32(
    family: str, models: Callable[[str], TinyModel], native: Callable[..., Engine]
) -> None:
    tiny = models(family)
    engine = native(tiny.path)
    assert engine.runner._model.stack is not None
    for length in (1, 64, 65, 150):
        got = rows_of(engine, prompt_of(length), chunk=97)
        want = tiny.logits(prompt_of(length))
        # What enters each product is rounded to 8 bits; the router of a mixture may then choose otherwise.
        assert (got - want).norm() / want.norm() < (0.05 if family == "mixtral" else 0.02)


@pytest.mark.parametrize(
    "family", ["llama", "llama_heads_of_128", "mistral_window", "qwen3_qk_norm", "mixtral"]
)
def test_a_tokens_logits_have_the_same_bits_in_every_batch_and_chunking(
    family: str, models: Callable[[str], TinyModel], native: Callable[..., Engine]
) -> None:
    engine = native(models(family).path)
    prompts = [prompt_of(n, seed=n) for n in (1, 130, 17, 70)]
    want = [rows_of(engine, prompt, chunk=len(prompt)) for prompt in prompts]
    for chunk in (1, 7, 64):
        assert torch.equal(rows_of(engine, prompts[1], chunk, seed=chunk), want[1])
    dealer, rng = BlockDealer(engine, seed=3), random.Random(5)
    sequences = [dealer.sequence(prompt) for prompt in prompts]
    while pending := [s for s in sequences if s.done < len(s.tokens)]:
        parts = [(s, min(rng.choice([1, 1, 2, 16, 33]), len(s.tokens) - s.done)) for s in pending]
        rng.shuffle(parts)
        step(engine, parts)
    for sequence, rows in zip(sequences, want, strict=True):
        assert torch.equal(torch.stack(sequence.logits), rows)


def test_threads_and_block_sizes_change_no_bit(
    models: Callable[[str], TinyModel], native: Callable[..., Engine], library: Library
) -> None:
    tiny, prompt = models("llama"), prompt_of(150)
    want = rows_of(native(tiny.path), prompt, chunk=150)
    for block in (1, 16, 64):
        engine = native(tiny.path, block)
        library.set_helpers([HelperCore(None)] * 2)
        assert torch.equal(rows_of(engine, prompt, chunk=40), want)


def test_what_others_left_in_the_pool_is_not_seen(
    models: Callable[[str], TinyModel], native: Callable[..., Engine]
) -> None:
    tiny, prompt = models("llama"), prompt_of(83)
    want = rows_of(native(tiny.path), prompt, chunk=20)
    engine = native(tiny.path)
    engine.runner.pools[0].tensor.fill_(float("nan"))
    assert torch.equal(rows_of(engine, prompt, chunk=20), want)


def test_only_the_rows_that_are_asked_for_get_logits(
    models: Callable[[str], TinyModel], native: Callable[..., Engine]
) -> None:
    engine = native(models("llama").path)
    want = rows_of(engine, prompt_of(30), chunk=30)
    sequence = BlockDealer(engine).sequence(prompt_of(30), room=4)
    greedy(engine, sequence, new_tokens=4, chunk=11)
    done: list[tuple[int, int]] = []
    first = SequenceSlice(tokens=prompt_of(30)[:29], start=0, blocks=sequence.blocks, logits=Logits.NONE)
    none = engine.runner.forward([first], layer_groups=2, on_layers_done=lambda a, b: done.append((a, b)))
    assert none.shape == (0, VOCAB)
    assert done == [(0, 1), (1, 3)]
    last = SequenceSlice(tokens=prompt_of(30)[29:], start=29, blocks=sequence.blocks)
    assert torch.equal(engine.runner.forward([last])[0], want[29])
