"""Two and four ranks compute the very model that one does."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pdserve.core.config import DType
from pdserve.core.errors import ConfigError
from pdserve.engine.build import Engine
from pdserve.engine.ranks import GlooRanks
from pdserve.models.hf_config import read_config
from pdserve.models.quantization.integers import IntWeight
from pdserve.models.sharding import ShardedSource, require_shardable
from tests.support.engines import BLOCK, prompt_of
from tests.support.quantisers import AwqQuantiser, Fp8Quantiser, GptqQuantiser, Quantiser, quantise_checkpoint
from tests.support.ranks import TIMEOUT_S, engine_of, on_every_rank, run_rank, run_steps, steps_of
from tests.support.stepping import BlockDealer, greedy
from tests.support.tiny_models import make_tiny_model_of

_COMMON: dict[str, Any] = {
    "vocab_size": 163,  # divides among no number of ranks
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama_all_biases": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "llama_fewer_kv_heads_than_ranks": lambda: LlamaConfig(**{**_COMMON, "num_key_value_heads": 2}),
    "qwen2_biased_tied": lambda: Qwen2Config(
        **{k: v for k, v in _COMMON.items() if k != "head_dim"} | {"hidden_size": 64},
        tie_word_embeddings=True,
    ),
    "qwen3_normed_heads": lambda: Qwen3Config(**_COMMON),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=20
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
}
# Sums of a few hundred float32 products in another order, through two layers.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}
PROMPT, NEW = 3 * BLOCK + 5, 10


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_tiny_model_of(FAMILIES[family](), made[family])
        return made[family]

    return get


def follow(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """Logits of every position."""
    return run_steps(engine, steps_of(tokens, engine.num_blocks, prompt=PROMPT))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_together_give_the_tokens_of_one(
    family: str, size: int, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(family)
    alone = engine_of(None, folder)
    sequence = BlockDealer(alone).sequence(prompt_of(PROMPT), room=NEW)
    wanted = greedy(alone, sequence, new_tokens=NEW, chunk=13)
    tokens = sequence.tokens[:-1]
    found = on_every_rank(size, lambda ranks: follow(engine_of(ranks, folder), tokens))[0]
    torch.testing.assert_close(found, torch.stack(sequence.logits), **TOLERANCE)
    assert found[PROMPT - 1 :].argmax(-1).tolist() == wanted


@pytest.mark.parametrize("size", [2, 4])
def test_a_bfloat16_model_stays_near_one_rank(size: int, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llama")
    tokens = prompt_of(PROMPT + NEW - 1)
    wanted = follow(engine_of(None, folder), tokens)
    found = on_every_rank(size, lambda r: follow(engine_of(r, folder, DType.BFLOAT16), tokens))[0]
    assert (found - wanted).norm() / wanted.norm() < 0.06  # the bound of one rank: weights have 8 bits


def test_every_rank_holds_its_kv_heads_and_its_part_of_the_fingerprint(
    folder_of: Callable[[str], Path],
) -> None:
    shards = on_every_rank(
        4, lambda r: engine_of(r, folder_of("llama_fewer_kv_heads_than_ranks")).fingerprint.shards[0]
    )
    assert [(s.tp_rank, s.tp_size, s.num_heads, s.first_head) for s in shards] == [
        (0, 4, 1, 0),
        (1, 4, 1, 0),
        (2, 4, 1, 1),
        (3, 4, 1, 1),
    ]
    assert all(shard.consistent and shard.total_heads == 2 for shard in shards)


def test_made_up_weights_are_those_of_one_rank(folder_of: Callable[[str], Path]) -> None:
    tokens = prompt_of(PROMPT + NEW - 1)
    folder = folder_of("qwen3_normed_heads")
    wanted = follow(engine_of(None, folder, load_format="dummy"), tokens)
    found = on_every_rank(2, lambda r: follow(engine_of(r, folder, load_format="dummy"), tokens))[0]
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_the_pools_of_all_ranks_have_as_many_blocks_as_the_smallest(
    folder_of: Callable[[str], Path],
) -> None:
    sizes = on_every_rank(2, lambda r: engine_of(r, folder_of("llama"), blocks=40 + 24 * r.rank).num_blocks)
    assert sizes == [40, 40]


@pytest.mark.parametrize(
    ("size", "what"),
    [(3, "8 attention heads"), (8, "sizes that fit: 1, 2, 4"), (16, "8 attention heads")],
)
def test_a_model_that_cannot_be_divided_is_refused(
    size: int, what: str, folder_of: Callable[[str], Path]
) -> None:
    config = read_config(folder_of("qwen3_moe"))
    if size == 8:
        config = dataclasses.replace(config, intermediate_size=100)
    with pytest.raises(ConfigError, match=what):
        require_shardable(config, size)


class Whole:
    """A source of one tensor stored as integers."""

    names = frozenset({"model.layers.0.mlp.down_proj.weight"})

    def __init__(self, weight: IntWeight) -> None:
        self.weight = weight

    def require(self, name: str, shape: Any) -> torch.Tensor:
        raise AssertionError(name)

    def integers(self, name: str, shape: Any) -> IntWeight:
        assert tuple(shape) == tuple(self.weight.codes_OI.shape)
        return self.weight


@pytest.mark.parametrize("groups", [12, 3, 1])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("part", ["down_proj", "gate_proj"])
def test_integer_weights_are_cut_with_their_groups(
    part: str, ordered: bool, groups: int, folder_of: Callable[[str], Path]
) -> None:
    config = read_config(folder_of("llama"))
    shape = (48, 96) if part == "down_proj" else (96, 48)
    whole = IntWeight(
        codes_OI=torch.randint(16, shape, dtype=torch.uint8),
        zeros_GO=torch.randint(16, (groups, shape[0]), dtype=torch.uint8),
        scales_GO=torch.rand(groups, shape[0]),
        group_of_I=None if ordered else torch.randint(groups, (shape[1],)),
        bits=4,
    )
    dim = 1 if part == "down_proj" else 0
    local = [length // 4 if at == dim else length for at, length in enumerate(shape)]
    cut = [
        ShardedSource(Whole(whole), config, rank, 4).integers(f"model.layers.0.mlp.{part}.weight", local)
        for rank in range(4)
    ]
    found = torch.cat([one.dequantised(torch.float32) for one in cut if one is not None], dim=dim)
    assert torch.equal(found, whole.dequantised(torch.float32))


@pytest.mark.parametrize("quantiser", [GptqQuantiser(), AwqQuantiser(), Fp8Quantiser()])
def test_quantised_weights_are_cut_as_they_are_stored(
    quantiser: Quantiser, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantised = tmp_path / "quantised"
    quantise_checkpoint(folder_of("llama"), quantised, tmp_path / "plain", quantiser, lambda _: False)
    tokens = prompt_of(PROMPT + NEW - 1)
    wanted = follow(engine_of(None, quantised), tokens)
    found = on_every_rank(2, lambda r: follow(engine_of(r, quantised), tokens))[0]
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_ranks_are_processes(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, alone = folder_of("llama"), engine_of(None, folder_of("llama"))
    steps = steps_of(prompt_of(PROMPT + NEW - 1), alone.num_blocks, prompt=PROMPT)
    wanted = run_steps(alone, steps)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            spawn.Process(
                target=run_rank, args=(r, 2, folder, Path(meeting, "m"), steps, tmp_path / "logits")
            )
            for r in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
    assert [process.exitcode for process in processes] == [0, 0]
    torch.testing.assert_close(torch.load(tmp_path / "logits"), wanted, **TOLERANCE)


def test_sums_have_the_same_bits_on_every_rank_and_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    large = torch.randn(4, 3001, 64)

    def add(ranks: GlooRanks) -> tuple[torch.Tensor, torch.Tensor]:
        mine = large[ranks.rank]
        return ranks.sum(mine.clone()), ranks.sum(mine[:5].clone())

    results = on_every_rank(4, add)
    in_order = ((large[0] + large[1]) + large[2]) + large[3]
    for whole, few in results:
        assert torch.equal(whole, in_order)
        assert torch.equal(few, in_order[:5])
