"""Quantised checkpoints serve exactly the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdserve.core.config import DType
from pdserve.core.errors import CheckpointError, MissingTensor, ShapeMismatch
from pdserve.models.checkpoint import Checkpoint, save_checkpoint
from pdserve.models.hf_config import read_config
from pdserve.models.quantization import fp8, integers
from pdserve.models.quantization.awq import Awq
from pdserve.models.quantization.gptq import Gptq
from pdserve.models.quantization.view import DequantisedView
from tests.support.engines import check_reference, engine_for, prompt_of
from tests.support.paths import shared
from tests.support.quantisers import (
    AwqQuantiser,
    Fp8Quantiser,
    GptqQuantiser,
    Quantiser,
    quantise_checkpoint,
)
from tests.support.stepping import BlockDealer, greedy, step
from tests.support.tiny_models import TinyModel

TinyModels = Callable[[str], TinyModel]

_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
        }
    },
    "ignore": ["lm_head", "re:.*layers.1.*down_proj"],
}
QUANTISERS: dict[str, Quantiser] = {
    "gptq": GptqQuantiser(),
    "gptq_symmetric": GptqQuantiser(symmetric=True),
    "gptq_act_order": GptqQuantiser(act_order=True),
    "gptq_v2": GptqQuantiser(v2=True),
    "gptq_one_group": GptqQuantiser(group_size=-1),
    "gptq_last_group_smaller": GptqQuantiser(group_size=32),
    "gptq_2_bit": GptqQuantiser(bits=2),
    "gptq_8_bit": GptqQuantiser(bits=8, symmetric=True),
    "awq": AwqQuantiser(),
    "fp8_tensor_static": Fp8Quantiser(
        extra={"input_scale": torch.tensor(0.5)},
        values={
            "quant_method": "fp8",
            "activation_scheme": "static",
            "ignored_layers": ["model.layers.1.mlp.down_proj"],
        },
    ),
    "fp8_tensor_of_one": Fp8Quantiser(scale_shape=lambda scale: scale.reshape(1)),
    "fp8_per_output": Fp8Quantiser(tall=1, scale_shape=lambda scale: scale, values=_COMPRESSED),
    "fp8_blocks": Fp8Quantiser(
        tall=32,
        wide=24,
        scale_name="weight_scale_inv",
        scale_shape=lambda scale: scale,
        values={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [32, 24],
            "modules_to_not_convert": ["model.layers.1.mlp.down_proj"],
        },
    ),
}


def spared(module: str) -> bool:
    return module.endswith("layers.1.mlp.down_proj")


def assert_same_weights(quantised: Path, plain: Path) -> None:
    scheme = read_config(quantised).quantization
    assert scheme is not None
    with Checkpoint.open(quantised) as stored, Checkpoint.open(plain) as meant:
        view = DequantisedView(stored, scheme, torch.float32)
        for name in meant.names:
            assert torch.equal(view.require(name, meant.shape(name)), meant.get(name)), name


@pytest.mark.parametrize("family", ["qwen2_qkv_bias", "qwen3_qk_norm"])
@pytest.mark.parametrize("kind", QUANTISERS)
def test_logits_are_exactly_those_of_the_weights_multiplied_out(
    kind: str, family: str, tiny_model: TinyModels, tmp_path: Path
) -> None:
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    quantise_checkpoint(tiny_model(family).path, quantised, plain, QUANTISERS[kind], spared)
    runs = []
    for folder in (quantised, plain):
        engine = engine_for(folder)
        sequence = BlockDealer(engine).sequence(prompt_of(21), room=8)
        tokens = greedy(engine, sequence, new_tokens=8, chunk=9)
        runs.append((tokens, torch.stack(sequence.logits), engine.fingerprint.model))
    assert runs[0][0] == runs[1][0]
    # The weights are the same bits; sums over memory that is aligned otherwise may differ in the last one.
    assert_same_weights(quantised, plain)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-5)
    assert runs[0][2] != runs[1][2]


def test_quantisations_of_one_model_have_different_fingerprints(
    tiny_model: TinyModels, tmp_path: Path
) -> None:
    source = tiny_model("qwen2_qkv_bias").path
    digests = set()
    for kind, quantiser in QUANTISERS.items():
        quantise_checkpoint(source, tmp_path / kind, tmp_path / "plain", quantiser, spared)
        with Checkpoint.open(tmp_path / kind) as checkpoint:
            digests.add(checkpoint.digest)
    assert len(digests) == len(QUANTISERS)


def test_a_weight_is_rounded_once_to_the_dtype_asked_for(tiny_model: TinyModels, tmp_path: Path) -> None:
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    quantise_checkpoint(tiny_model("qwen3_qk_norm").path, quantised, plain, GptqQuantiser(), spared)
    name = "model.layers.0.mlp.gate_proj.weight"
    with Checkpoint.open(plain) as checkpoint:
        meant = checkpoint.get(name).clone()
    scheme = read_config(quantised).quantization
    assert scheme is not None
    with Checkpoint.open(quantised) as checkpoint:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = DequantisedView(checkpoint, scheme, dtype).require(name, meant.shape)
            assert found.dtype is dtype
            assert torch.equal(found, meant.to(dtype))


@pytest.mark.parametrize(
    "kind", ["gptq_act_order", "awq", "fp8_blocks", "fp8_per_output", "fp8_tensor_static"]
)
def test_a_large_tensor_is_multiplied_out_in_parts(
    kind: str, tiny_model: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    quantise_checkpoint(tiny_model("qwen3_qk_norm").path, quantised, plain, QUANTISERS[kind], spared)
    for module in (integers, fp8):
        monkeypatch.setattr(module, "CHUNK_NUMBERS", 7 * 48)
    assert_same_weights(quantised, plain)


def save_module(folder: Path, **tensors: torch.Tensor) -> Path:
    save_checkpoint(folder, {}, {f"m.{name}": tensor for name, tensor in tensors.items()})
    return folder


def int32(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def test_gptq_counts_from_the_lowest_bits_down_the_inputs(tmp_path: Path) -> None:
    folder = save_module(
        tmp_path,
        qweight=int32([0x76543210] * 8),
        qzeros=int32([0x0]),  # less one: the zero point is 1
        scales=torch.full((1, 8), 0.5, dtype=torch.float16),
    )
    scheme = Gptq(bits=4, group_size=None, zeros_less_one=True)
    with Checkpoint.open(folder) as checkpoint:
        found = scheme.weight(checkpoint, "m", torch.float32)
    assert torch.equal(found, (torch.arange(8.0) - 1).mul(0.5).expand(8, 8))


def test_a_gptq_zero_point_of_zero_is_stored_as_all_ones(tmp_path: Path) -> None:
    folder = save_module(
        tmp_path, qweight=int32([0] * 8), qzeros=int32([-1]), scales=torch.ones(1, 8, dtype=torch.float16)
    )
    scheme = Gptq(bits=4, group_size=None, zeros_less_one=True)
    with Checkpoint.open(folder) as checkpoint:
        assert not scheme.weight(checkpoint, "m", torch.float32).any()


def test_awq_interleaves_eight_outputs(tmp_path: Path) -> None:
    folder = save_module(
        tmp_path,
        qweight=int32([0x75316420], [0x0]),
        qzeros=int32([0x75316420]),
        scales=torch.ones(1, 8, dtype=torch.float16),
    )
    with Checkpoint.open(folder) as checkpoint:
        found = Awq(group_size=2).weight(checkpoint, "m", torch.float32)
    assert torch.equal(found, torch.stack([torch.zeros(8), -torch.arange(8.0)], dim=1))


@pytest.fixture
def gptq_folder(tiny_model: TinyModels, tmp_path: Path) -> Path:
    folder = tmp_path / "quantised"
    quantise_checkpoint(
        tiny_model("qwen3_qk_norm").path, folder, tmp_path / "plain", GptqQuantiser(act_order=True), spared
    )
    return folder


def with_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """The same checkpoint with one tensor changed, or left out."""
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: checkpoint.get(name).clone() for name in checkpoint.names}
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_checkpoint(folder, json.loads((folder / "config.json").read_text()), tensors)
    return folder


PROJECTION = "model.layers.2.self_attn.o_proj"


@pytest.mark.parametrize(
    ("end", "change", "error", "words"),
    [
        ("g_idx", lambda t: t + 100, CheckpointError, "groups 0 to"),
        ("g_idx", lambda t: t - 1, CheckpointError, "groups 0 to"),
        ("g_idx", lambda t: t[:-1].contiguous(), ShapeMismatch, "g_idx"),
        ("scales", lambda t: t[:, :-1].contiguous(), ShapeMismatch, "scales"),
        ("qzeros", lambda t: t[:-1].contiguous(), ShapeMismatch, "qzeros"),
        ("qweight", lambda t: t.float(), CheckpointError, "int32"),
        ("qweight", lambda t: t[:-1].contiguous(), ShapeMismatch, "o_proj.weight"),
        ("qweight", lambda t: None, MissingTensor, "o_proj.weight"),
        ("scales", lambda t: None, MissingTensor, "scales"),
    ],
)
def test_gptq_tensors_that_do_not_fit_together_are_named(
    gptq_folder: Path,
    end: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    error: type[CheckpointError],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        engine_for(with_tensor(gptq_folder, f"{PROJECTION}.{end}", change))


def test_gptq_without_group_indices_has_runs_of_neighbours(tiny_model: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    quantise_checkpoint(tiny_model("qwen3_qk_norm").path, folder, tmp_path / "plain", GptqQuantiser(), spared)
    before = engine_for(folder)
    after = engine_for(with_tensor(folder, f"{PROJECTION}.g_idx", lambda t: None))
    logits = [
        torch.stack(sequence.logits)
        for engine in (before, after)
        for sequence in [BlockDealer(engine).sequence(prompt_of(9), room=1)]
        if greedy(engine, sequence, 1, 9)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "change", "error", "words"),
    [
        ("weight_scale_inv", lambda t: None, MissingTensor, "weight_scale_inv"),
        ("weight_scale_inv", lambda t: t[:1].contiguous(), ShapeMismatch, "weight_scale_inv"),
        ("weight_scale_inv", lambda t: t.int(), CheckpointError, "floating point"),
        ("weight", lambda t: t[:-1].contiguous(), ShapeMismatch, "weight"),
    ],
)
def test_fp8_scales_that_do_not_fit_are_named(
    tiny_model: TinyModels,
    tmp_path: Path,
    end: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    error: type[CheckpointError],
    words: str,
) -> None:
    folder = tmp_path / "quantised"
    quantise_checkpoint(
        tiny_model("qwen3_qk_norm").path, folder, tmp_path / "plain", QUANTISERS["fp8_blocks"], spared
    )
    with pytest.raises(error, match=words):
        engine_for(with_tensor(folder, f"{PROJECTION}.{end}", change))


def test_fp8_weights_that_no_config_speaks_of_are_refused(tiny_model: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    quantise_checkpoint(
        tiny_model("qwen3_qk_norm").path, folder, tmp_path / "plain", QUANTISERS["fp8_blocks"], spared
    )
    shutil.copy(tmp_path / "plain" / "config.json", folder)
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        engine_for(folder)


def test_modelopt_says_so_in_a_file_of_its_own(tiny_model: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    quantise_checkpoint(
        tiny_model("qwen3_qk_norm").path, folder, tmp_path / "plain", QUANTISERS["fp8_tensor_static"], spared
    )
    wanted = read_config(folder).quantization
    shutil.copy(tmp_path / "plain" / "config.json", folder)
    assert read_config(folder).quantization is None
    details = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": details}))
    assert read_config(folder).quantization == wanted is not None
    engine_for(folder)


@pytest.mark.parametrize("form", ["gptq-int4", "awq-int4", "fp8-block"])
def test_a_published_quantised_model_gives_its_reference_answers(form: str) -> None:
    folder = shared(f"models/stories15M-{form}")
    engine = engine_for(folder, DType.FLOAT32, block=64, blocks=8)
    check_reference(engine, folder / "reference.json", max_tokens=40)


PUBLISHED_LOSS = {"gptq-int4": 3.209 / 3.038, "awq-int4": 3.225 / 3.038, "fp8-block": 3.058 / 3.038}
"""Perplexity over that of the float32 model, both on text that was drawn from the model."""


@pytest.fixture(scope="module")
def drawn_texts() -> list[list[int]]:
    """What the float32 model says by itself, from a fixed seed."""
    engine = engine_for(shared("models/stories15M"), DType.FLOAT32, block=64, blocks=64)
    dealer, generator = BlockDealer(engine), torch.Generator().manual_seed(0)
    texts = [dealer.sequence([1], room=160) for _ in range(16)]
    for _ in range(159):
        step(engine, [(text, 1) for text in texts])
        chances = torch.softmax(torch.stack([text.logits[-1] for text in texts]), -1)
        for text, token in zip(texts, torch.multinomial(chances, 1, generator=generator), strict=True):
            text.tokens.append(int(token))
    return [text.tokens for text in texts]


def perplexity(folder: Path, texts: list[list[int]], dtype: DType) -> float:
    engine = engine_for(folder, dtype, block=64, blocks=64)
    dealer, losses = BlockDealer(engine), []
    for tokens in texts:
        sequence = dealer.sequence(tokens)
        step(engine, [(sequence, len(tokens))])
        rows = torch.log_softmax(torch.stack(sequence.logits[:-1]), -1)
        losses.append(-rows[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])])
    return float(torch.cat(losses).mean().exp())


@pytest.mark.slow
def test_perplexities_are_the_published_ones(drawn_texts: list[list[int]]) -> None:
    plain = perplexity(shared("models/stories15M"), drawn_texts, DType.FLOAT32)
    for form, loss in PUBLISHED_LOSS.items():
        found = perplexity(shared(f"models/stories15M-{form}"), drawn_texts, DType.FLOAT32)
        # Another text than the published one: two and a half thousand tokens of the same model.
        assert found / plain == pytest.approx(loss, abs=0.015), form
