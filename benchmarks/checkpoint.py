"""Checkpoints of random weights, for speed comparisons at a size whose real weights are not here.

    python -m benchmarks.checkpoint 1B --out out/models/random-1B

A Hugging Face folder in bfloat16 that every system loads like any other: `benchmarks.shapes` says its shape,
and the tokenizer, with the size of its vocabulary, is that of another model. What it answers means nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from benchmarks.shapes import SHAPES, Shape
from pdserve.models.store import DEFAULT_MODEL, resolve

SCALE: Final = 0.02
"""Standard deviation of the weights, as models are initialised."""
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


def write_checkpoint(shape: Shape, tokenizer_of: Path, out: Path, *, seed: int = 0) -> None:
    """Write config, tokenizer and weights to `out`, one file of weights for every layer."""
    vocab = int(json.loads((tokenizer_of / "config.json").read_text())["vocab_size"])
    shape = replace(shape, vocab=vocab)
    shape.write_config(out)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_of / name, out / name)
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    generator = torch.Generator().manual_seed(seed)
    files = [(f"layer-{layer}.safetensors", _layer(shape, layer)) for layer in range(shape.layers)]
    files.append(("rest.safetensors", _rest(shape)))
    index: dict[str, str] = {}
    for file, wanted in files:
        tensors = {name: _weight(sizes, generator) for name, sizes in wanted}
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    listed = {"metadata": {}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(listed))


def _weight(sizes: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(sizes) == 1:  # of a norm
        return torch.ones(sizes, dtype=torch.bfloat16)
    return (torch.randn(sizes, generator=generator) * SCALE).bfloat16()


def _layer(shape: Shape, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    at, q, kv = f"model.layers.{layer}", shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, outputs in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield f"{at}.self_attn.{name}.weight", (outputs, shape.hidden)
    yield f"{at}.self_attn.o_proj.weight", (shape.hidden, q)
    yield f"{at}.mlp.gate_proj.weight", (shape.ff, shape.hidden)
    yield f"{at}.mlp.up_proj.weight", (shape.ff, shape.hidden)
    yield f"{at}.mlp.down_proj.weight", (shape.hidden, shape.ff)
    yield f"{at}.input_layernorm.weight", (shape.hidden,)
    yield f"{at}.post_attention_layernorm.weight", (shape.hidden,)


def _rest(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL, help="the model whose tokenizer it gets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_checkpoint(SHAPES[options.shape], resolve(options.tokenizer), options.out, seed=options.seed)
    print(options.out)


if __name__ == "__main__":
    main()
