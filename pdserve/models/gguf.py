"""Convert a GGUF file of the Llama family to a Hugging Face directory, dequantised to bfloat16, once.

llama.cpp stores q and k of its `llama` architecture with each head's rows interleaved, because its RoPE turns
neighbouring pairs; Hugging Face turns the first half against the second. The rows are put back here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from torch import Tensor

from pdserve.core.errors import CheckpointError
from pdserve.models.files import Progress, staged_dir, write_json
from pdserve.models.gguf_metadata import Arch, Metadata, eos_token_ids, hf_config, open_gguf, read_arch
from pdserve.models.gguf_tokenizer import write_tokenizer
from pdserve.models.safetensors_writer import SafetensorsWriter, TensorSpec

_STEP_ELEMENTS: Final = 16 * 2**20
"""Dequantised at a time: 64 MiB of float32, whatever the size of the tensor."""

_TOP: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INTERLEAVED: Final = ("attn_q", "attn_k")
_LEFT_OUT: Final = ("rope_freqs.weight",)  # its content is in config.json


@dataclass(frozen=True, slots=True)
class _Source:
    """A GGUF tensor on its way: its Hugging Face name and, where rows are interleaved, the rows of a head."""

    name: str
    tensor: ReaderTensor
    head_rows: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self.tensor.shape))


def convert(source: Path, target: Path, progress: Progress | None = None) -> Path:
    """Write `target` (which must not exist; its parent must) from the GGUF file `source`; all or nothing.

    The weights are bfloat16 whatever the file holds. Raises `CheckpointError` for a file that is broken, of
    another family, or quantised in a way the gguf package cannot undo.
    """
    if progress is not None:
        progress(0.0, f"reading {source.name}")
    reader = open_gguf(source)
    meta = Metadata(str(source), reader)
    arch = read_arch(meta)
    config = hf_config(meta, arch)
    head_dim = config["head_dim"]
    assert isinstance(head_dim, int)  # hf_config writes it so
    sources = [_source(meta, arch, tensor, head_dim) for tensor in _wanted(reader)]
    with staged_dir(target) as folder:
        write_json(folder / "config.json", config)
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": config["bos_token_id"], "eos_token_id": list(eos_token_ids(meta))},
        )
        write_tokenizer(meta, folder)
        _write_weights(folder / "model.safetensors", sources, meta.file, progress)
    return target


def _wanted(reader: GGUFReader) -> list[ReaderTensor]:
    return [tensor for tensor in reader.tensors if tensor.name not in _LEFT_OUT]


def _source(meta: Metadata, arch: Arch, tensor: ReaderTensor, head_dim: int) -> _Source:
    parts = tensor.name.split(".")
    match parts:
        case [top, kind] if top in _TOP and kind in ("weight", "bias"):
            return _Source(f"{_TOP[top]}.{kind}", tensor, None)
        case ["blk", layer, name, kind] if name in _LAYER and layer.isdigit() and kind in ("weight", "bias"):
            interleaved = arch == "llama" and name in _INTERLEAVED
            return _Source(
                f"model.layers.{layer}.{_LAYER[name]}.{kind}", tensor, head_dim if interleaved else None
            )
        case _:
            raise CheckpointError(
                f"{meta.file}: tensor {tensor.name!r} is not part of a {arch} model as it is known here"
            )


def _write_weights(path: Path, sources: list[_Source], file: str, progress: Progress | None) -> None:
    specs = {source.name: TensorSpec(torch.bfloat16, source.shape) for source in sources}
    total = sum(spec.size_bytes for spec in specs.values())
    done = 0
    with SafetensorsWriter(path, specs) as writer:
        for source in sources:
            for rows in _dequantised(source, file):
                writer.append(rows)
                done += rows.numel() * rows.element_size()
                if progress is not None:
                    progress(done / total, f"converting {Path(file).name}")


def _dequantised(source: _Source, file: str) -> Iterator[Tensor]:
    """The tensor in bfloat16, in pieces of whole rows."""
    tensor = source.tensor
    rows = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
    width = max(1, int(tensor.n_elements) // len(rows))
    step = max(1, _STEP_ELEMENTS // width)
    if source.head_rows is not None:
        rows = tensor.data  # a bias has one element a row
        if len(rows) % source.head_rows:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} has {len(rows)} rows, "
                f"not a multiple of head_dim {source.head_rows}"
            )
        step = max(1, step // source.head_rows) * source.head_rows
    for start in range(0, len(rows), step):
        try:
            values = gguf.dequantize(np.asarray(rows[start : start + step]), tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"{file}: tensor {tensor.name!r}: {error}") from error
        piece = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: F32 comes as a view of the map
        if source.head_rows is not None:
            piece = _halves(piece, source.head_rows)
        yield piece.to(torch.bfloat16)


def _halves(rows: Tensor, head_rows: int) -> Tensor:
    """Rows of each head from (0, 0', 1, 1', ...) to (0, 1, ..., 0', 1', ...)."""
    pairs = rows.reshape(-1, head_rows // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
