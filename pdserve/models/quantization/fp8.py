"""FP8 checkpoints (e4m3): a scale per tensor, per output, or per block of the weight.

Tensors of a module: `weight` float8_e4m3fn [O, I], and one of

    weight_scale      [] or [1]: the whole tensor (AutoFP8, ModelOpt); [O] or [O, 1]: each output
    weight_scale_inv  [ceil(O / bo), ceil(I / bi)]: blocks (DeepSeek-V3, Qwen3-FP8); also multiplied, in
                      spite of its name

Scales of activations and of the KV cache that lie beside them are not needed: both stay unquantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdserve.core.errors import CheckpointError, MissingTensor, ShapeMismatch
from pdserve.models.quantization.integers import CHUNK_NUMBERS
from pdserve.models.quantization.scheme import StoredTensors


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
        outputs, inputs = self.shape(stored, module)
        scale_RC = self._scale(stored, module, outputs, inputs)
        weight_OI = stored.get(f"{module}.weight")
        out = torch.empty(outputs, inputs, dtype=dtype)
        tall, wide = self.block or (max(1, outputs // scale_RC.shape[0]), inputs)
        rows = max(1, CHUNK_NUMBERS // (inputs * tall)) * tall
        for first in range(0, outputs, rows):
            part = slice(first, min(first + rows, outputs))
            scale = scale_RC[part.start // tall : -(-part.stop // tall)]
            scale = scale.repeat_interleave(tall, 0)[: part.stop - part.start]
            out[part] = weight_OI[part].float() * scale.repeat_interleave(wide, 1)[:, :inputs]
        return out

    def integers(self, stored: StoredTensors, module: str) -> None:
        """Its weights are no integers."""

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
