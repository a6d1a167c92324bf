"""Mixtures of experts: only chosen experts run, and every spelling of a checkpoint is the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdserve.core.errors import MissingTensor, ShapeMismatch
from pdserve.models.checkpoint import Checkpoint, save_checkpoint
from pdserve.models.cpu_experts import CpuExperts
from tests.support.engines import engine_for, prompt_of
from tests.support.quantisers import Fp8Quantiser, GptqQuantiser, Quantiser, quantise_checkpoint
from tests.support.stepping import BlockDealer, greedy
from tests.support.tiny_models import TinyModel

TinyModels = Callable[[str], TinyModel]
FAMILIES = ("mixtral", "qwen3_moe_some_layers_dense")


@dataclass
class CountingLinear:
    """A product that remembers how many rows each call had."""

    weight_OI: Tensor
    rows: list[int] = field(default_factory=list)

    def __call__(self, x_TI: Tensor) -> Tensor:
        self.rows.append(x_TI.shape[0])
        return x_TI @ self.weight_OI.t()


def experts_of(count: int, width: int, hidden: int) -> tuple[CpuExperts, list[CountingLinear]]:
    generator = torch.Generator().manual_seed(3)
    up = [CountingLinear(torch.randn(width, hidden, generator=generator)) for _ in range(count)]
    down = [CountingLinear(torch.randn(hidden, width, generator=generator)) for _ in range(count)]
    return CpuExperts(tuple(up), tuple(down), torch.relu), up  # type: ignore[arg-type]  # acts like a product


def test_only_experts_that_a_token_chose_are_computed_once_each() -> None:
    experts, up = experts_of(64, 4, 6)
    chosen = torch.tensor([[5, 63], [63, 0], [5, 63]])
    experts(torch.randn(3, 6), torch.rand(3, 2), chosen)
    assert {index: linear.rows for index, linear in enumerate(up) if linear.rows} == {0: [1], 5: [2], 63: [3]}


@pytest.mark.parametrize(("tokens", "chosen"), [(0, 2), (1, 1), (1, 8), (33, 3)])
def test_every_token_gets_the_weighted_sum_of_its_experts(tokens: int, chosen: int) -> None:
    experts, up = experts_of(8, 4, 6)
    x, weight = torch.randn(tokens, 6), torch.rand(tokens, chosen)
    expert = torch.rand(tokens, 8).topk(chosen).indices
    wanted = torch.zeros(tokens, 6)
    for t in range(tokens):
        for k in range(chosen):
            index = int(expert[t, k])
            hidden = torch.relu(up[index].weight_OI @ x[t])
            wanted[t] += weight[t, k] * (experts.down[index].weight_OI @ hidden)  # type: ignore[union-attr]
    before = x.clone()
    torch.testing.assert_close(experts(x, weight, expert), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def spelled(tiny: TinyModel, spelling: str, folder: Path) -> Path:
    """The model's weights under the names of one generation of transformers."""
    config = json.loads((tiny.path / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    mixtral = config["architectures"] == ["MixtralForCausalLM"]
    for name, tensor in tiny.oracle.state_dict().items():
        if spelling == "together" or ".experts." not in name:
            old_gate = spelling == "apart" and mixtral and name.endswith("mlp.gate.weight")
            tensors[name.replace(".mlp.", ".block_sparse_moe.") if old_gate else name] = tensor.clone()
            continue
        prefix, kind = name.rsplit(".", 1)
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
        letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for expert, weight in enumerate(tensor):
            for part, piece in zip(parts, weight.chunk(len(parts)), strict=True):
                end = letters[part] if mixtral else part
                start = prefix.replace(".mlp.", ".block_sparse_moe.") if mixtral else prefix
                tensors[f"{start}.{expert}.{end}.weight"] = piece.clone()
    save_checkpoint(folder, config, tensors)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["together", "apart"])
def test_both_spellings_of_a_checkpoint_give_the_tokens_of_transformers(
    spelling: str, family: str, tiny_model: TinyModels, tmp_path: Path
) -> None:
    tiny = tiny_model(family)
    engine = engine_for(spelled(tiny, spelling, tmp_path / "model"))
    sequence = BlockDealer(engine).sequence(prompt_of(23), room=10)
    tokens = greedy(engine, sequence, new_tokens=10, chunk=9)
    want = tiny.logits(sequence.tokens[:-1])
    torch.testing.assert_close(torch.stack(sequence.logits), want, rtol=2e-4, atol=2e-4)
    assert tokens == want.argmax(-1)[22:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "quantiser",
    [
        GptqQuantiser(group_size=8, act_order=True),
        Fp8Quantiser(
            tall=16,
            wide=16,
            scale_name="weight_scale_inv",
            scale_shape=lambda scale: scale,
            values={"quant_method": "fp8", "weight_block_size": [16, 16]},
        ),
    ],
    ids=["gptq", "fp8_blocks"],
)
def test_quantised_experts_serve_what_they_stand_for(
    quantiser: Quantiser, family: str, tiny_model: TinyModels, tmp_path: Path
) -> None:
    source = spelled(tiny_model(family), "apart", tmp_path / "source")
    quantise_checkpoint(
        source, tmp_path / "quantised", tmp_path / "plain", quantiser, lambda module: module.endswith("gate")
    )
    runs = []
    for name in ("quantised", "plain"):
        engine = engine_for(tmp_path / name)
        sequence = BlockDealer(engine).sequence(prompt_of(14), room=6)
        runs.append((greedy(engine, sequence, 6, chunk=5), torch.stack(sequence.logits)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", ["together", "apart"])
def test_a_missing_expert_and_a_wrong_shape_are_named(
    spelling: str, tiny_model: TinyModels, tmp_path: Path
) -> None:
    folder = spelled(tiny_model("mixtral"), spelling, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    name = {
        "together": "model.layers.1.mlp.experts.down_proj",
        "apart": "model.layers.1.block_sparse_moe.experts.5.w2.weight",
    }[spelling]
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: checkpoint.get(name).clone() for name in checkpoint.names}
    wrong = tensors.pop(name)[..., :-1].contiguous()
    save_checkpoint(tmp_path / "missing", config, tensors)
    with pytest.raises(MissingTensor, match=name):
        engine_for(tmp_path / "missing")
    save_checkpoint(tmp_path / "wrong", config, {**tensors, name: wrong})
    with pytest.raises(ShapeMismatch, match=name):
        engine_for(tmp_path / "wrong")
