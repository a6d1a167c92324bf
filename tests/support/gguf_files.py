"""Small GGUF files as llama.cpp's converter would write them, from tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

HF_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(kw_only=True)
class Vocab:
    """The tokenizer section. With `scores` it is sentencepiece, with `merges` byte-level BPE."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float] | None = None
    merges: Sequence[str] | None = None
    pre: str = "default"
    bos: int | None = None
    eos: int | None = None
    add_bos: bool | None = None
    chat_template: str | None = None
    extra: Mapping[str, int] = field(default_factory=dict)


def byte_vocab(**changes: object) -> Vocab:
    """256 bytes, five merges, three control tokens: the smallest byte-level BPE that does something."""
    alphabet = gguf_alphabet()
    tokens = [*alphabet, "th", "the", "Ġthe", "an", "12", "<|begin|>", "<|end|>", "<|im_end|>"]
    values: dict[str, object] = {
        "tokens": tokens,
        "kinds": [NORMAL] * 261 + [CONTROL] * 3,
        "merges": ["t h", "th e", "Ġ the", "a n", "1 2"],
        "pre": "gpt-2",
        "bos": 261,
        "eos": 262,
    }
    return Vocab(**(values | changes))  # type: ignore[arg-type]  # a test names its own changes


def gguf_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(
    path: Path,
    arch: str,
    sizes: Mapping[str, int],
    tensors: Mapping[str, torch.Tensor],
    vocab: Vocab,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra_tensors: Mapping[str, NDArray[np.float32]] | None = None,
    metadata: Mapping[str, float | str] | None = None,
) -> Path:
    """sizes: layers, heads, kv_heads, head_dim, hidden, ff, context."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["hidden"])
    writer.add_feed_forward_length(sizes["ff"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    _add_vocab(writer, vocab)
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            data = interleaved(data, sizes["heads" if ".q_proj." in name else "kv_heads"])
        quantise = data.ndim > 1 and kind is not gguf.GGMLQuantizationType.F32
        stored = gguf.quantize(data, kind) if quantise else data
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind if quantise else None)
    for name, data in (extra_tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(data: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The row order that llama.cpp's converter gives q and k of its llama architecture."""
    halves = data.reshape(num_heads, 2, data.shape[0] // num_heads // 2, *data.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{HF_TO_GGUF[rest]}.{kind}"


def _add_vocab(writer: gguf.GGUFWriter, vocab: Vocab) -> None:
    writer.add_tokenizer_model("gpt2" if vocab.scores is None else "llama")
    writer.add_token_list(list(vocab.tokens))
    writer.add_token_types(list(vocab.kinds))
    if vocab.scores is not None:
        writer.add_token_scores(list(vocab.scores))
    else:
        writer.add_tokenizer_pre(vocab.pre)
        writer.add_token_merges(list(vocab.merges or []))
    if vocab.bos is not None:
        writer.add_bos_token_id(vocab.bos)
    if vocab.eos is not None:
        writer.add_eos_token_id(vocab.eos)
    if vocab.add_bos is not None:
        writer.add_add_bos_token(vocab.add_bos)
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)
    for key, value in vocab.extra.items():
        writer.add_uint32(key, value)


def tiny_gguf(path: Path, *, seed: int = 1) -> Path:
    """A whole Qwen3 model of one layer with random weights and the vocabulary of `byte_vocab`."""
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 16, "ff": 32, "context": 64}
    vocab = byte_vocab(add_bos=False)
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(vocab.tokens), 16),
        layer + "input_layernorm.weight": (16,),
        layer + "self_attn.q_proj.weight": (16, 16),
        layer + "self_attn.k_proj.weight": (8, 16),
        layer + "self_attn.v_proj.weight": (8, 16),
        layer + "self_attn.o_proj.weight": (16, 16),
        layer + "self_attn.q_norm.weight": (8,),
        layer + "self_attn.k_norm.weight": (8,),
        layer + "post_attention_layernorm.weight": (16,),
        layer + "mlp.gate_proj.weight": (32, 16),
        layer + "mlp.up_proj.weight": (32, 16),
        layer + "mlp.down_proj.weight": (16, 32),
        "model.norm.weight": (16,),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return write_gguf(path, "qwen3", sizes, tensors, vocab)
