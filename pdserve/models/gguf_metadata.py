"""The metadata of a GGUF file, typed, and the Hugging Face configuration it amounts to.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from pdserve.core.errors import CheckpointError, MissingTensor, UnsupportedArchitecture
from pdserve.models.gguf_bounds import check_lengths

Arch = Literal["llama", "qwen2", "qwen3"]
ARCHITECTURES: Final[dict[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
END_OF_TURN: Final = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")
"""Control tokens that end an answer although older files name only one `eos_token_id`."""

_CONTROL: Final = 3


@dataclass(frozen=True, slots=True)
class Metadata:
    """Typed access to the key-value section; every complaint names file, key and expectation."""

    file: str
    reader: GGUFReader

    def get_int(self, key: str) -> int | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # some converters write a per-layer list of one and the same number
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "one integer", value)
        return value

    def get_float(self, key: str) -> float | None:
        value = self._get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return None if value is None else float(value)
        raise self.wrong(key, "a number", value)

    def get_bool(self, key: str) -> bool | None:
        value = self._get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "a boolean", value)

    def get_str(self, key: str) -> str | None:
        value = self._get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(key, "a string", value)

    def get_list(self, key: str) -> list[object] | None:
        value = self._get(key)
        if value is None or isinstance(value, list):
            return value
        raise self.wrong(key, "an array", value)

    def int(self, key: str) -> int:
        value = self.get_int(key)
        if value is None or value < 1:
            raise self.wrong(key, "a positive integer", value)
        return value

    def _get(self, key: str) -> object:
        field = self.reader.get_field(key)
        if field is None:
            return None
        try:
            value: object = field.contents()
        except (UnicodeDecodeError, IndexError, ValueError) as error:
            raise CheckpointError(f"{self.file}: metadata {key} cannot be read: {error}") from error
        return value

    def wrong(self, key: str, wanted: str, found: object) -> CheckpointError:
        shown = "nothing" if found is None else repr(found)[:80]
        return CheckpointError(f"{self.file}: metadata {key} must be {wanted}, found {shown}")


def open_gguf(path: Path) -> GGUFReader:
    """Map a GGUF file. Raises `CheckpointError` for a truncated file or one that is none."""
    try:
        check_lengths(path)
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a complete GGUF file of version 2 or 3 ({error}); download it again"
        ) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if int(tensor.n_elements) == 0:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} has no elements")
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} ends past the end of the file; it is truncated"
            )
    return reader


def read_arch(meta: Metadata) -> Arch:
    found = meta.get_str("general.architecture") or "nothing"
    if found not in ARCHITECTURES:
        raise UnsupportedArchitecture(found, tuple(ARCHITECTURES), meta.file)
    if meta.get_int(f"{found}.expert_count"):
        raise UnsupportedArchitecture(f"{found} with experts", tuple(ARCHITECTURES), meta.file)
    return found  # type: ignore[return-value]  # narrowed by the test above


def hf_config(meta: Metadata, arch: Arch) -> dict[str, object]:
    """What config.json of the same model would say."""
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in meta.reader.tensors}
    if "token_embd.weight" not in shapes:
        raise MissingTensor("token_embd.weight", meta.file)
    num_heads = meta.int(f"{arch}.attention.head_count")
    hidden_size = meta.int(f"{arch}.embedding_length")
    head_dim = meta.get_int(f"{arch}.attention.key_length") or hidden_size // num_heads
    value_dim = meta.get_int(f"{arch}.attention.value_length") or head_dim
    if value_dim != head_dim:
        raise meta.wrong(f"{arch}.attention.value_length", f"the key length {head_dim}", value_dim)
    rotated = meta.get_int(f"{arch}.rope.dimension_count") or head_dim
    if rotated != head_dim:
        raise meta.wrong(f"{arch}.rope.dimension_count", f"the head's {head_dim}", rotated)
    window = meta.get_int(f"{arch}.attention.sliding_window") or None
    config: dict[str, object] = {
        "architectures": [
            "MistralForCausalLM" if arch == "llama" and window is not None else ARCHITECTURES[arch]
        ],
        "model_type": "mistral" if arch == "llama" and window is not None else arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": meta.int(f"{arch}.feed_forward_length"),
        "num_hidden_layers": meta.int(f"{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.get_int(f"{arch}.attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta.int(f"{arch}.context_length"),
        # GGUF holds float32; repr of the shortest decimal gives 1e-05 back
        "rms_norm_eps": _shortest(meta.get_float(f"{arch}.attention.layer_norm_rms_epsilon") or 1e-6),
        "rope_theta": _shortest(meta.get_float(f"{arch}.rope.freq_base") or 10000.0),
        "rope_scaling": _rope_scaling(meta, arch, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": meta.get_int("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(eos_token_ids(meta)),
        "torch_dtype": "bfloat16",
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if window is not None:
        config["sliding_window"] = window
        if arch != "llama":
            config |= {"use_sliding_window": True, "max_window_layers": 0}
    return config


def eos_token_ids(meta: Metadata) -> tuple[int, ...]:
    """The ids the file names as ends, and the well-known end-of-turn control tokens of its vocabulary."""
    ids = [meta.get_int(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = meta.get_list("tokenizer.ggml.tokens") or []
    kinds = meta.get_list("tokenizer.ggml.token_type") or []
    controls = {
        token: index for index, token in enumerate(tokens) if index < len(kinds) and kinds[index] == _CONTROL
    }
    ids += [controls.get(text) for text in END_OF_TURN]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _rope_scaling(meta: Metadata, arch: Arch, head_dim: int) -> Mapping[str, object] | None:
    factors = next((t for t in meta.reader.tensors if t.name == "rope_freqs.weight"), None)
    if factors is not None:
        return _llama3_scaling(meta, arch, head_dim, np.asarray(factors.data, dtype=np.float32).reshape(-1))
    kind = meta.get_str(f"{arch}.rope.scaling.type")
    factor = meta.get_float(f"{arch}.rope.scaling.factor") or meta.get_float(f"{arch}.rope.scale_linear")
    if kind in (None, "none") and factor in (None, 0.0, 1.0):
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor or 1.0}
    raise meta.wrong(f"{arch}.rope.scaling.type", "none or linear", kind)


def llama3_factors(
    theta: float, head_dim: int, factor: float, *, low: float = 1.0, high: float = 4.0, original: int = 8192
) -> NDArray[np.float32]:
    """What Llama 3.1 divides each rotary frequency by (its config.json `rope_scaling`), [head_dim / 2]."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / frequency
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _llama3_scaling(
    meta: Metadata, arch: Arch, head_dim: int, found: NDArray[np.float32]
) -> Mapping[str, object]:
    """Recover the parameters of `rope_type: llama3`, of which GGUF keeps only the resulting factors."""
    theta = meta.get_float(f"{arch}.rope.freq_base") or 10000.0
    factor = float(found[-1]) if found.size else 1.0
    expected = llama3_factors(theta, head_dim, factor)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise CheckpointError(
            f"{meta.file}: tensor 'rope_freqs.weight' holds frequency factors that are not Llama 3's "
            f"(low 1, high 4, original context 8192, factor {factor:g}); only those are supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
