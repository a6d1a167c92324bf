"""config.json to ModelConfig: families, spellings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pdserve.core.errors import CheckpointError, UnsupportedArchitecture
from pdserve.models.checkpoint import save_checkpoint
from pdserve.models.config import MoeConfig, RopeConfig, RopeKind
from pdserve.models.hf_config import read_config
from pdserve.models.quantization.awq import Awq
from pdserve.models.quantization.fp8 import Fp8
from pdserve.models.quantization.gptq import Gptq
from pdserve.models.quantization.scheme import Scheme
from tests.support.paths import shared

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
SCALING: dict[str, object] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def folder_with(tmp_path: Path, changes: dict[str, object], *, without: tuple[str, ...] = ()) -> Path:
    config = {key: value for key, value in (LLAMA | changes).items() if key not in without}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_plain_llama_config_is_read_with_the_defaults_of_its_class(tmp_path: Path) -> None:
    config = read_config(folder_with(tmp_path, {}))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 2, 8)
    assert config.rope == RopeConfig(theta=10000.0)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False,) * 4
    assert not config.tie_word_embeddings
    assert config.sliding_window is None


def test_llama_2_without_kv_heads_has_as_many_as_query_heads(tmp_path: Path) -> None:
    assert read_config(folder_with(tmp_path, {}, without=("num_key_value_heads",))).num_kv_heads == 8


def test_llama_biases_cover_q_k_v_and_o(tmp_path: Path) -> None:
    config = read_config(folder_with(tmp_path, {"attention_bias": True, "mlp_bias": True}))
    assert config.qkv_bias
    assert config.o_bias
    assert config.mlp_bias


@pytest.mark.parametrize("name_key", ["rope_type", "type"])
def test_llama_3_scaling_is_read_in_the_old_spelling(tmp_path: Path, name_key: str) -> None:
    changes = {"rope_theta": 500000.0, "rope_scaling": {name_key: "llama3", **SCALING}}
    assert read_config(folder_with(tmp_path, changes)).rope == RopeConfig(
        theta=500000.0, kind=RopeKind.LLAMA3, factor=8.0, original_max_position=8192
    )


def test_both_spellings_of_the_same_model_are_equal(tmp_path: Path) -> None:
    old = read_config(
        folder_with(tmp_path, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}})
    )
    changes = {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING},
        "dtype": "bfloat16",
    }
    assert read_config(folder_with(tmp_path, changes, without=("torch_dtype",))) == old


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    rope = read_config(folder_with(tmp_path, {"rope_scaling": {"type": "linear", "factor": 4}})).rope
    assert (rope.kind, rope.factor) == (RopeKind.LINEAR, 4.0)


def test_mistral_slides_over_its_window_and_null_means_full_attention(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read_config(folder_with(tmp_path, mistral | {"sliding_window": 128})).sliding_window == 128
    assert read_config(folder_with(tmp_path, mistral | {"sliding_window": None})).sliding_window is None


def test_a_window_as_long_as_the_context_is_full_attention(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 512}
    assert read_config(folder_with(tmp_path, mistral)).sliding_window is None


def test_qwen2_has_biases_on_q_k_and_v_only_and_ignores_its_window_unless_told(tmp_path: Path) -> None:
    qwen: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 128,
        "use_sliding_window": False,
        "max_window_layers": 2,
    }
    config = read_config(folder_with(tmp_path, qwen))
    assert config.qkv_bias
    assert not config.o_bias
    assert config.sliding_window is None


@pytest.mark.parametrize(("first_sliding_layer", "window"), [(0, 128), (4, None)])
def test_qwen2_layers_slide_from_max_window_layers_on(
    tmp_path: Path, first_sliding_layer: int, window: int | None
) -> None:
    qwen: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 128,
        "use_sliding_window": True,
        "max_window_layers": first_sliding_layer,
    }
    assert read_config(folder_with(tmp_path, qwen)).sliding_window == window


def test_a_model_in_which_only_some_layers_slide_is_refused(tmp_path: Path) -> None:
    qwen: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 128,
        "use_sliding_window": True,
        "max_window_layers": 2,
    }
    with pytest.raises(CheckpointError, match="layers"):
        read_config(folder_with(tmp_path, qwen))


def test_qwen3_norms_q_and_k_and_takes_head_dim_from_the_file_or_its_class(tmp_path: Path) -> None:
    qwen: dict[str, object] = {"architectures": ["Qwen3ForCausalLM"]}
    assert read_config(folder_with(tmp_path, qwen)).head_dim == 128
    config = read_config(folder_with(tmp_path, qwen | {"head_dim": 32}))
    assert config.head_dim == 32
    assert config.qk_norm
    assert not config.qkv_bias


def test_end_ids_come_from_generation_config_before_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"eos_token_id": 2, "bos_token_id": 1})
    assert read_config(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9, 7]}')
    config = read_config(folder)
    assert config.eos_token_ids == (7, 9)
    assert config.bos_token_id == 1


def test_an_unstated_dtype_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    save_checkpoint(tmp_path, config, {"model.norm.weight": torch.ones(64, dtype=torch.float16)})
    assert read_config(tmp_path).dtype == "float16"


_MIXTRAL: dict[str, object] = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN3_MOE: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
_GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
_AWQ: dict[str, object] = {"quant_method": "awq", "bits": 4, "group_size": 128}
_TENSORS: dict[str, object] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
WRONG_QUANTISATIONS: list[tuple[object, list[str]]] = [
    ("fp8", ["quantization_config", "object"]),
    ({}, ["quant_method", "GPTQ"]),
    ({"quant_method": "mxfp4"}, ["quant_method", "mxfp4", "AWQ"]),
    ({"quant_method": ["fp8"]}, ["quant_method", "string"]),
    ({"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e4m3"]),
    ({"quant_method": "fp8", "activation_scheme": "x"}, ["activation_scheme", "dynamic"]),
    ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size"]),
    ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ["weight_block_size"]),
    ({"quant_method": "fp8", "weight_block_size": [True, True]}, ["weight_block_size"]),
    ({"quant_method": "fp8", "weight_block_size": [2**40, 1]}, ["weight_block_size"]),
    ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, ["modules_to_not_convert", "list"]),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["quant_algo", "NVFP4"]),
    ({**_GPTQ, "bits": 3}, ["bits", "2, 4 or 8"]),
    ({**_GPTQ, "bits": True}, ["bits"]),
    ({**_GPTQ, "group_size": 0}, ["group_size"]),
    ({**_GPTQ, "group_size": None}, ["group_size"]),
    ({**_GPTQ, "group_size": 2**40}, ["group_size"]),
    ({**_GPTQ, "desc_act": "yes"}, ["desc_act"]),
    ({**_GPTQ, "checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
    ({**_GPTQ, "is_marlin_format": True}, ["is_marlin_format"]),
    ({**_GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, ["dynamic"]),
    ({**_AWQ, "bits": 8}, ["bits", "4"]),
    ({**_AWQ, "version": "gemv"}, ["version", "gemv"]),
    ({**_AWQ, "zero_point": False}, ["zero_point"]),
    ({**_TENSORS, "format": "pack-quantized"}, ["format", "pack-quantized"]),
    (_TENSORS, ["config_groups"]),
    ({**_TENSORS, "config_groups": {"g": {}}}, ["config_groups"]),
    (
        {**_TENSORS, "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}},
        ["type", "float"],
    ),
    (
        {**_TENSORS, "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "strategy": "x"}}}},
        ["strategy"],
    ),
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GptOssForCausalLM"]}, ["GptOssForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": [], "model_type": "gpt2"}, ["gpt2"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["architecture"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "yarn", "llama3"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["type", "dynamic"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, ["factor"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "object"]),
        ({"rope_theta": "big"}, ["rope_theta", "number"]),
        ({"rope_theta": float("nan")}, ["rope_theta"]),
        ({"rope_theta": float("inf")}, ["rope_theta", "finite"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        *((({"quantization_config": wrong}), words) for wrong, words in WRONG_QUANTISATIONS),
        ({**_MIXTRAL, "num_local_experts": 0}, ["num_local_experts"]),
        ({**_MIXTRAL, "num_local_experts": None}, ["experts"]),
        ({**_MIXTRAL, "num_experts_per_tok": 9}, ["num_experts_per_tok", "8"]),
        ({**_QWEN3_MOE, "moe_intermediate_size": None}, ["moe_intermediate_size"]),
        ({**_QWEN3_MOE, "decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        ({**_QWEN3_MOE, "mlp_only_layers": ["1"]}, ["mlp_only_layers"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"hidden_size": "64"}, ["hidden_size", "integer"]),
        ({"hidden_size": True}, ["hidden_size"]),
        ({"hidden_size": 65}, ["hidden_size", "num_attention_heads"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"head_dim": 7}, ["head_dim", "even"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps"]),
        ({"torch_dtype": "int8"}, ["torch_dtype", "bfloat16"]),
        ({"eos_token_id": [1, "2"]}, ["eos_token_id"]),
        ({"eos_token_id": -5}, ["eos_token_id"]),
    ],
)
def test_what_cannot_be_served_is_one_error_that_names_file_and_key(
    tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(folder_with(tmp_path, changes))
    for word in ["config.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\udcff", "9" * 5000])
def test_a_config_that_is_no_json_object_is_a_typed_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"quantization": {"quant_algo": "NVFP4"}}', '{"quantization": "FP8"}']
)
def test_a_modelopt_file_that_is_wrong_is_named(tmp_path: Path, text: str) -> None:
    folder = folder_with(tmp_path, {})
    (folder / "hf_quant_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="hf_quant_config"):
        read_config(folder)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"quant_method": "fp8"}, Fp8(block=None)),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, Fp8(block=(128, 64))),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Fp8(block=None)),
        (_GPTQ, Gptq(bits=4, group_size=128, zeros_less_one=True)),
        ({**_GPTQ, "group_size": -1}, Gptq(bits=4, group_size=None, zeros_less_one=True)),
        (
            {**_GPTQ, "checkpoint_format": "gptq_v2", "dynamic": {"-:.*gate": {}}},
            Gptq(bits=4, group_size=128, zeros_less_one=False),
        ),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, Awq(group_size=64)),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {
                        "weights": {
                            "type": "float",
                            "num_bits": 8,
                            "strategy": "block",
                            "block_structure": [128, 128],
                        }
                    }
                },
            },
            Fp8(block=(128, 128)),
        ),
    ],
)
def test_what_the_config_says_of_quantised_weights(
    tmp_path: Path, values: dict[str, object], wanted: Scheme
) -> None:
    assert read_config(folder_with(tmp_path, {"quantization_config": values})).quantization == wanted


def test_what_a_mixture_leaves_out_takes_the_default_of_its_class(tmp_path: Path) -> None:
    left_out = {"rms_norm_eps": None, "rope_theta": None}
    mixtral = read_config(folder_with(tmp_path, {**_MIXTRAL, **left_out}))
    assert (mixtral.rope.theta, mixtral.rms_norm_eps, mixtral.sliding_window) == (1e6, 1e-5, None)
    layers = tuple(range(mixtral.num_layers))
    width = mixtral.intermediate_size
    assert mixtral.moe == MoeConfig(
        num_experts=8, experts_per_token=2, intermediate_size=width, normalised=True, layers=layers
    )
    qwen = read_config(folder_with(tmp_path, {**_QWEN3_MOE, **left_out, "mlp_only_layers": [1]}))
    assert (qwen.rope.theta, qwen.rms_norm_eps, qwen.qk_norm) == (1e4, 1e-6, True)
    assert qwen.moe == MoeConfig(
        num_experts=8,
        experts_per_token=2,
        intermediate_size=24,
        normalised=False,
        layers=tuple(layer for layer in layers if layer != 1),
    )


SERVED = {
    "Qwen--Qwen3-0.6B": (28, 16, 8, 128),
    "Qwen--Qwen3-8B": (36, 32, 8, 128),
    "Qwen--Qwen3-32B": (64, 64, 8, 128),
    "Qwen--Qwen3-32B-FP8": (64, 64, 8, 128),
    "meta-llama--Llama-3.3-70B-Instruct": (80, 64, 8, 128),
    "meta-llama--Meta-Llama-3.1-405B": (126, 128, 8, 128),
    "meta-llama--Meta-Llama-3.1-70B": (80, 64, 8, 128),
    "meta-llama--Meta-Llama-3.1-8B": (32, 32, 8, 128),
    "mistralai--Mixtral-8x7B-v0.1": (32, 32, 8, 128),
    "Qwen--Qwen3-235B-A22B": (94, 64, 4, 128),
    "Qwen--Qwen3-30B-A3B": (48, 32, 4, 128),
    "Qwen--Qwen3-30B-A3B-FP8": (48, 32, 4, 128),
    # FP8 weights, but what says so is a file beside config.json that is not among the data
    "nvidia--Llama-3.1-70B-Instruct-FP8": (80, 64, 8, 128),
}


def test_every_published_config_is_read_or_refused_with_a_typed_error(tmp_path: Path) -> None:
    files = sorted(shared("configs").glob("*_config.json"))
    assert files
    for file in files:
        (tmp_path / "config.json").write_bytes(file.read_bytes())
        name = file.name.removesuffix("_config.json")
        if name in SERVED:
            config = read_config(tmp_path)
            shape = (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
            assert shape == SERVED[name], name
            expected = RopeKind.LLAMA3 if "lama" in name else RopeKind.DEFAULT
            assert config.rope.kind is expected, name
            in_blocks = name.startswith("Qwen") and "FP8" in name
            assert config.quantization == (Fp8(block=(128, 128)) if in_blocks else None), name
        else:
            with pytest.raises(UnsupportedArchitecture):
                read_config(tmp_path)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("window", [None, 64])
def test_what_transformers_writes_is_what_it_and_we_read(
    tmp_path: Path, architecture: str, window: int | None
) -> None:
    import transformers

    values = {key: value for key, value in LLAMA.items() if key not in ("architectures", "torch_dtype")}
    if architecture in ("Qwen2", "Qwen3"):
        values |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    if architecture != "Llama":
        values["sliding_window"] = window
    written = getattr(transformers, f"{architecture}Config")(
        **values,
        architectures=[f"{architecture}ForCausalLM"],
        dtype="float16",
        eos_token_id=[5, 6],
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    )
    written.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.architecture == f"{architecture}ForCausalLM"
    assert config.head_dim == (getattr(written, "head_dim", None) or 8)
    assert config.sliding_window == (None if architecture == "Llama" else window)
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == (RopeKind.LINEAR, 2.0, 1e6)
    assert config.dtype == "float16"
    assert config.eos_token_ids == (5, 6)
    assert config.tie_word_embeddings is written.tie_word_embeddings
