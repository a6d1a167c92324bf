"""FP8 checkpoints (e4m3): a scale per tensor, per output, or per block of the weight.

Tensors of a module: `weight` float8_e4m3fn [O, I], and one of

    weight_scale      [] or [1]: the whole tensor (AutoFP8, ModelOpt); [O] or [O, 1]: each output
    weight_scale_inv  [ceil(O / bo), ceil(I / bi)]: blocks (DeepSeek-V3, Qwen3-FP8); also multiplied, in
                      spite of its name

Scales of activations and of the KV cache that lie beside them are not needed: both stay unquantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.core.errors import CheckpointError, MissingTensor, ShapeMismatch
from pdserve.models.quantization.integers import CHUNK_NUMBERS
from pdserve.models.quantization.scheme import StoredTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """weight[o, i] = codes[o, i] * scales[o // tall, i // wide]."""

    codes_OI: Tensor
    """float8_e4m3fn."""
    scales_RC: Tensor
    """float32 [ceil(O / tall), ceil(I / wide)]."""
    tall: int
    wide: int

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[O, I], computed in float32 and rounded once."""
        outputs, inputs = self.codes_OI.shape
        out = torch.empty(outputs, inputs, dtype=dtype)
        rows = max(1, CHUNK_NUMBERS // (inputs * self.tall)) * self.tall
        for first in range(0, outputs, rows):
            part = slice(first, min(first + rows, outputs))
            scale = self.scales_RC[part.start // self.tall : -(-part.stop // self.tall)]
            scale = scale.repeat_interleave(self.tall, 0)[: part.stop - part.start]
            out[part] = self.codes_OI[part].float() * scale.repeat_interleave(self.wide, 1)[:, :inputs]
        return out

    def by_output(self) -> Fp8Weight:
        """The same, with scales that are no taller than one output."""
        scales_OC = self.scales_RC.repeat_interleave(self.tall, 0)[: self.codes_OI.shape[0]]
        return Fp8Weight(codes_OI=self.codes_OI, scales_RC=scales_OC, tall=1, wide=self.wide)


def stacked_floats(parts: Sequence[Fp8Weight]) -> Fp8Weight | None:
    """One weight of several, along the outputs; None where their scales' widths differ."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.wide != first.wide for part in parts):
        return None
    whole = all(part.tall == first.tall and part.codes_OI.shape[0] % part.tall == 0 for part in parts[:-1])
    if not whole or parts[-1].tall != first.tall:
        parts = [part.by_output() for part in parts]
    return Fp8Weight(
        # As bytes: torch joins no FP8 tensors on every device.
        codes_OI=torch.cat([part.codes_OI.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn),
        scales_RC=torch.cat([part.scales_RC for part in parts]),
        tall=parts[0].tall,
        wide=first.wide,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """See `Scheme`."""

    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None is a scale per tensor or per output."""

    @property
    def name(self) -> str:
        return "FP8" if self.block is None else f"FP8, blocks of {self.block[0]}x{self.block[1]}"

    def holds(self, stored: StoredTensors, module: str) -> bool:
        name = f"{module}.weight"
        return name in stored.names and stored.dtype(name) is torch.float8_e4m3fn

    def shape(self, stored: StoredTensors, module: str) -> tuple[int, int]:
        found = stored.shape(f"{module}.weight")
        if len(found) != 2:
            raise CheckpointError(f"{stored.folder}: {module}.weight must have 2 dimensions, found {found}")
        return found[0], found[1]

    def weight(self, stored: StoredTensors, module: str, dtype: torch.dtype) -> Tensor:
        return self.floats(stored, module).dequantised(dtype)

    def integers(self, stored: StoredTensors, module: str) -> None:
        """Its weights are no integers."""

    def floats(self, stored: StoredTensors, module: str) -> Fp8Weight:
        """The weight before it is multiplied out. Raises `CheckpointError` as `weight` does."""
        outputs, inputs = self.shape(stored, module)
        scales_RC = self._scale(stored, module, outputs, inputs)
        tall, wide = self.block or (max(1, outputs // scales_RC.shape[0]), inputs)
        return Fp8Weight(codes_OI=stored.get(f"{module}.weight"), scales_RC=scales_RC, tall=tall, wide=wide)

    def _scale(self, stored: StoredTensors, module: str, outputs: int, inputs: int) -> Tensor:
        """float32 [rows, columns] of factors, each for a rectangle of the weight."""
        names = (f"{module}.weight_scale_inv", f"{module}.weight_scale")
        name = next((name for name in names if name in stored.names), None)
        if name is None:
            raise MissingTensor(names[0] if self.block else names[1], stored.folder)
        if not stored.dtype(name).is_floating_point:
            raise CheckpointError(f"{stored.folder}: {name} must be floating point, not {stored.dtype(name)}")
        found = stored.shape(name)
        if self.block is not None:
            wanted: tuple[int, ...] = (-(-outputs // self.block[0]), -(-inputs // self.block[1]))
            if found != wanted:
                raise ShapeMismatch(name, stored.folder, wanted, found)
            return stored.get(name).float()
        if found in ((), (1,), (1, 1)):
            return stored.get(name).float().reshape(1, 1)
        if found not in ((outputs,), (outputs, 1)):
            raise ShapeMismatch(name, stored.folder, (1,), found)
        return stored.get(name).float().reshape(outputs, 1)
