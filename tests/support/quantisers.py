"""Quantise a plain checkpoint in each published layout, with arithmetic of its own, one number at a time.

Every quantiser returns the tensors to store and the weight they stand for, float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdserve.models.checkpoint import Checkpoint, save_checkpoint

Quantised = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by the end of their name, such as `qweight`; and what they stand for."""


def _codes_in_groups(
    weight_OI: Tensor, group_of: list[int], groups: int, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """Codes [O, I], zero points and scales [G, O], and the weight they stand for."""
    outputs, inputs = weight_OI.shape
    top = 2**bits - 1
    codes = np.zeros((outputs, inputs), np.int64)
    zeros = np.zeros((groups, outputs), np.int64)
    scales = np.zeros((groups, outputs), np.float16)
    meant = torch.zeros(outputs, inputs)
    weight = weight_OI.float().numpy()
    group = np.array(group_of)
    for g in range(groups):
        members = np.flatnonzero(group == g)
        for o in range(outputs):
            row = weight[o, members]
            low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            scale = np.float16(max(high - low, 1e-4) / top)
            zero = (top + 1) // 2 if symmetric else int(np.clip(round(-low / float(scale)), 0, top))
            found = np.clip(np.round(row / np.float32(scale)) + zero, 0, top).astype(np.int64)
            codes[o, members], zeros[g, o], scales[g, o] = found, zero, scale
            meant[o, members] = torch.from_numpy((found - zero).astype(np.float32) * np.float32(scale))
    return codes, zeros, scales, meant


def _packed(values: np.ndarray, bits: int, order: list[int] | None = None) -> Tensor:
    """Pack the last axis into int32; place j of an int32 holds the neighbour `order[j]`."""
    per = 32 // bits
    order = order or list(range(per))
    *rest, count = values.shape
    out = np.zeros((*rest, count // per), np.uint32)
    for column in range(count // per):
        for place, neighbour in enumerate(order):
            code = values[..., column * per + neighbour].astype(np.uint32)
            out[..., column] |= code << np.uint32(place * bits)
    return torch.from_numpy(out.view(np.int32))


@dataclass(frozen=True)
class GptqQuantiser:
    bits: int = 4
    group_size: int = 16
    symmetric: bool = False
    act_order: bool = False
    v2: bool = False
    """The newer format, which stores zero points as they are."""

    def config(self) -> dict[str, object]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
        }

    def __call__(self, weight_OI: Tensor) -> Quantised:
        inputs = weight_OI.shape[1]
        size = inputs if self.group_size == -1 else self.group_size
        group_of = [i // size for i in range(inputs)]
        if self.act_order:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)).tolist()
            group_of = [group_of[i] for i in order]
        groups = max(group_of) + 1
        codes, zeros, scales, meant = _codes_in_groups(weight_OI, group_of, groups, self.bits, self.symmetric)
        kept_zeros = zeros if self.v2 else (zeros - 1) % 2**self.bits
        stored = {
            "qweight": _packed(codes, self.bits).t().contiguous(),
            "qzeros": _packed(kept_zeros, self.bits),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        return stored, meant


@dataclass(frozen=True)
class AwqQuantiser:
    group_size: int = 16

    def config(self) -> dict[str, object]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "GEMM",
        }

    def __call__(self, weight_OI: Tensor) -> Quantised:
        inputs = weight_OI.shape[1]
        group_of = [i // self.group_size for i in range(inputs)]
        codes, zeros, scales, meant = _codes_in_groups(weight_OI, group_of, max(group_of) + 1, 4, False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        stored = {
            "qweight": _packed(np.ascontiguousarray(codes.T), 4, order),
            "qzeros": _packed(zeros, 4, order),
            "scales": torch.from_numpy(scales),
        }
        return stored, meant


@dataclass(frozen=True)
class Fp8Quantiser:
    """Scales per rectangle of the weight; None for a side is all of it."""

    tall: int | None = None
    wide: int | None = None
    scale_name: str = "weight_scale"
    scale_shape: Callable[[Tensor], Tensor] = field(default=lambda scale: scale.reshape(()))
    extra: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=lambda: {"quant_method": "fp8"})

    def config(self) -> dict[str, object]:
        return self.values

    def __call__(self, weight_OI: Tensor) -> Quantised:
        outputs, inputs = weight_OI.shape
        tall, wide = self.tall or outputs, self.wide or inputs
        extra = {end: tensor.clone() for end, tensor in self.extra.items()}
        codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
        meant = torch.empty(outputs, inputs)
        scale_RC = torch.empty(-(-outputs // tall), -(-inputs // wide))
        for row in range(scale_RC.shape[0]):
            for column in range(scale_RC.shape[1]):
                part = (slice(row * tall, (row + 1) * tall), slice(column * wide, (column + 1) * wide))
                scale = weight_OI[part].float().abs().max() / 448
                codes[part] = (weight_OI[part].float() / scale).to(torch.float8_e4m3fn)
                scale_RC[row, column] = scale
                meant[part] = codes[part].float() * scale
        return {"weight": codes, self.scale_name: self.scale_shape(scale_RC), **extra}, meant


Quantiser = GptqQuantiser | AwqQuantiser | Fp8Quantiser


def quantise_checkpoint(
    source: Path, quantised: Path, plain: Path, quantiser: Quantiser, spared: Callable[[str], bool]
) -> None:
    """Write the checkpoint quantised, and the same weights multiplied out; norms, embeddings and modules
    that `spared` names stay as they are."""
    config = json.loads((source / "config.json").read_text())
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    with Checkpoint.open(source) as checkpoint:
        for name in sorted(checkpoint.names):
            tensor, module = checkpoint.get(name).clone(), name.removesuffix(".weight")
            if tensor.ndim != 2 or "embed" in name or "lm_head" in name or spared(module):
                stored[name] = meant[name] = tensor
                continue
            parts, weight = quantiser(tensor)
            stored |= {f"{module}.{end}": part for end, part in parts.items()}
            meant[name] = weight
    save_checkpoint(plain, config, meant)
    save_checkpoint(quantised, {**config, "quantization_config": quantiser.config()}, stored)
