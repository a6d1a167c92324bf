"""Read a Hugging Face config.json of the Llama family, in the spelling of transformers 4 or 5.

What is left out of the file takes the default of the model's own class in transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pdserve.core.errors import CheckpointError, UnsupportedArchitecture
from pdserve.models.checkpoint import stored_dtype
from pdserve.models.config import ModelConfig, MoeConfig, RopeConfig, RopeKind
from pdserve.models.quantization.read import read_scheme
from pdserve.text.json_file import JsonObject, read_object, read_object_if_there

SUPPORTED: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
DTYPES: Final = ("bfloat16", "float16", "float32")

_MISTRAL_WINDOW: Final = 4096  # MistralConfig's default where the key is absent; `null` means none
_QWEN3_HEAD_DIM: Final = 128  # Qwen3Config's default
_MIXTRAL_THETA: Final = 1e6  # MixtralConfig's default
_ALL_LAYERS_SLIDE: Final = ("MistralForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")
_QK_NORM: Final = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def read_config(folder: Path) -> ModelConfig:
    """The model's configuration. Raises `UnsupportedArchitecture` for another family, `CheckpointError` for a
    value that is missing, wrong, or is not served (YaRN, mixed layers, another way to quantise)."""
    config = read_object(folder / "config.json")
    architecture = _architecture(config)
    if (act := config.get_str("hidden_act")) not in (None, "silu"):
        raise config.wrong("hidden_act", f"silu, the only activation served, not {act}")
    hidden_size, num_heads = config.positive_int("hidden_size"), config.positive_int("num_attention_heads")
    num_layers = config.positive_int("num_hidden_layers")
    max_position = config.positive_int("max_position_embeddings")
    attention_bias = bool(config.get_bool("attention_bias"))
    bos, eos = _special_ids(config, folder)
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.positive_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive_int("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, architecture, num_heads),
        head_dim=_head_dim(config, architecture, hidden_size, num_heads),
        rms_norm_eps=_eps(config, 1e-5 if architecture == "MixtralForCausalLM" else 1e-6),
        rope=_rope(config, max_position, _MIXTRAL_THETA if architecture == "MixtralForCausalLM" else 10000.0),
        max_position=max_position,
        tie_word_embeddings=bool(config.get_bool("tie_word_embeddings")),
        qkv_bias=architecture == "Qwen2ForCausalLM" or (_has_attention_bias(architecture) and attention_bias),
        qk_norm=architecture in _QK_NORM,
        o_bias=_has_attention_bias(architecture) and attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get_bool("mlp_bias")),
        sliding_window=_sliding_window(config, architecture, num_layers, max_position),
        moe=_moe(config, architecture, num_layers),
        dtype=_dtype(config, folder),
        quantization=read_scheme(config, folder),
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _architecture(config: JsonObject) -> str:
    names = config.get_list("architectures")
    found = names[0] if names else config.data.get("model_type", "nothing")
    if found not in SUPPORTED:
        raise UnsupportedArchitecture(str(found)[:80], SUPPORTED, config.file)
    return str(found)


def _num_kv_heads(config: JsonObject, architecture: str, num_heads: int) -> int:
    if architecture == "LlamaForCausalLM" and "num_key_value_heads" not in config:
        return num_heads
    num_kv_heads = config.positive_int("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    return num_kv_heads


def _head_dim(config: JsonObject, architecture: str, hidden_size: int, num_heads: int) -> int:
    if "head_dim" in config:
        head_dim = config.positive_int("head_dim")
    elif architecture == "Qwen3ForCausalLM":
        head_dim = _QWEN3_HEAD_DIM
    else:
        if hidden_size % num_heads:
            raise config.wrong("hidden_size", f"a multiple of num_attention_heads={num_heads}")
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise CheckpointError(f"{config.file}: head_dim must be even (RoPE turns pairs), found {head_dim}")
    return head_dim


def _eps(config: JsonObject, default: float) -> float:
    eps = config.get_float("rms_norm_eps")
    if eps is None:
        return default
    if not 0.0 <= eps < 1.0:
        raise config.wrong("rms_norm_eps", "a number in [0, 1)")
    return eps


def _has_attention_bias(architecture: str) -> bool:
    """Whether `attention_bias` means anything (q, k, v and o alike) in this class."""
    return architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def _rope(config: JsonObject, max_position: int, default_theta: float) -> RopeConfig:
    # transformers 5 keeps theta and scaling together in rope_parameters
    scaling = config.get_object("rope_parameters") or config.get_object("rope_scaling")
    theta = scaling.get_float("rope_theta") if scaling is not None else None
    if theta is None:
        theta = config.get_float("rope_theta")
    if theta is None:
        theta = default_theta
    if not theta > 0.0:
        raise config.wrong("rope_theta", "a positive number")
    for source in (config, scaling):
        if source is not None and source.get_float("partial_rotary_factor") not in (None, 1.0):
            raise source.wrong("partial_rotary_factor", "1: heads that are turned in part are not served")
    if scaling is None:
        return RopeConfig(theta=theta)
    name = scaling.get_str("rope_type") or scaling.get_str("type") or "default"
    if name not in tuple(RopeKind):  # a tuple: Python 3.11 asks no enum whether it holds a str
        wanted = f"one of {', '.join(RopeKind)}"
        raise scaling.wrong("rope_type" if "rope_type" in scaling else "type", wanted)
    kind = RopeKind(name)
    if kind is RopeKind.DEFAULT:
        return RopeConfig(theta=theta)
    factor = _positive(scaling, "factor")
    if kind is RopeKind.LINEAR:
        return RopeConfig(theta=theta, kind=kind, factor=factor, original_max_position=max_position)
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    if not low < high:
        raise scaling.wrong("high_freq_factor", f"above low_freq_factor={low:g}")
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=scaling.positive_int("original_max_position_embeddings"),
    )


def _positive(config: JsonObject, key: str) -> float:
    value = config.get_float(key)
    if value is None or not value > 0.0:
        raise config.wrong(key, "a positive number")
    return value


def _sliding_window(config: JsonObject, architecture: str, num_layers: int, max_position: int) -> int | None:
    window = _stated_window(config, architecture)
    if window is None:
        return None
    kinds = config.get_list("layer_types")
    if kinds is not None:
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif architecture in _ALL_LAYERS_SLIDE:
        sliding = [True]
    else:
        first = config.get_int("max_window_layers")  # Qwen: the layers from this one on slide
        sliding = [layer >= (28 if first is None else first) for layer in range(num_layers)]
    if not any(sliding):
        return None
    if not all(sliding):
        raise CheckpointError(
            f"{config.file}: some layers have sliding-window attention and some do not; "
            "only models whose layers are all alike are served"
        )
    return None if window >= max_position else window


def _stated_window(config: JsonObject, architecture: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    if architecture.startswith("Qwen") and not config.get_bool("use_sliding_window"):
        return None
    if "sliding_window" not in config.data:
        return None if architecture == "MixtralForCausalLM" else _MISTRAL_WINDOW
    return config.positive_int("sliding_window") if "sliding_window" in config else None


def _moe(config: JsonObject, architecture: str, num_layers: int) -> MoeConfig | None:
    if architecture not in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        return None
    num_experts = config.positive_int("num_local_experts" if "num_local_experts" in config else "num_experts")
    chosen = config.positive_int("num_experts_per_tok")
    if chosen > num_experts:
        raise config.wrong("num_experts_per_tok", f"at most the number of experts, {num_experts}")
    if architecture == "MixtralForCausalLM":
        width, normalised, layers = "intermediate_size", True, tuple(range(num_layers))
    else:
        width, normalised = "moe_intermediate_size", bool(config.get_bool("norm_topk_prob"))
        layers = _sparse_layers(config, num_layers)
    return MoeConfig(
        num_experts=num_experts,
        experts_per_token=chosen,
        intermediate_size=config.positive_int(width),
        normalised=normalised,
        layers=layers,
    )


def _sparse_layers(config: JsonObject, num_layers: int) -> tuple[int, ...]:
    step = config.positive_int("decoder_sparse_step") if "decoder_sparse_step" in config else 1
    dense = config.get_list("mlp_only_layers") or []
    if not all(isinstance(layer, int) for layer in dense):
        raise config.wrong("mlp_only_layers", "a list of layer numbers")
    return tuple(i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense)


def _dtype(config: JsonObject, folder: Path) -> str:
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = config.get_str(key)
    if name is None:
        return stored_dtype(folder) or "bfloat16"
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise config.wrong(key, f"one of {', '.join(DTYPES)}")
    return name


def _special_ids(config: JsonObject, folder: Path) -> tuple[int | None, tuple[int, ...]]:
    generation = read_object_if_there(folder / "generation_config.json")
    bos = config.get_token_ids("bos_token_id")
    eos = generation.get_token_ids("eos_token_id") if generation is not None else ()
    return (bos[0] if bos else None), eos or config.get_token_ids("eos_token_id")
