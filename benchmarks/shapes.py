"""Llama shapes that are measured with random weights: speed does not depend on what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocab: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the projections of a layer, as they are computed."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "out": (self.hidden, q),
            "gate+up": (2 * self.ff, self.hidden),
            "down": (self.hidden, self.ff),
        }

    @property
    def layer_weights(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def attention_flops(self, pairs: int) -> int:
        """Of all layers, for so many pairs of a query and a key."""
        return 4 * self.layers * self.heads * self.head_dim * pairs

    def write_config(self, folder: Path) -> None:
        """The config.json of a checkpoint of this shape; it has no weights."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))


SHAPES: Final = {  # up to 1B with the default model's vocabulary, whose tokenizer they can be given
    "135M": Shape(
        name="135M", hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ff=1536, vocab=49152, tied=True
    ),
    "1B": Shape(
        name="1B", hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ff=8192, vocab=49152, tied=False
    ),
    "8B": Shape(
        name="8B",
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ff=14336,
        vocab=128256,
        tied=False,
    ),
}
