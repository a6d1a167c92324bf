"""A quantised checkpoint seen as one of plain weights, each multiplied out when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdserve.core.errors import ShapeMismatch
from pdserve.models.quantization.fp8 import Fp8, Fp8Weight
from pdserve.models.quantization.integers import IntWeight
from pdserve.models.quantization.scheme import Scheme, StoredTensors

WEIGHT = ".weight"


class DequantisedView:
    """`WeightSource` over a quantised checkpoint: any model loads from it as if it had never been quantised.

    Holds nothing: beside what the caller keeps, one tensor is in memory at a time.
    """

    def __init__(self, stored: StoredTensors, scheme: Scheme, dtype: torch.dtype) -> None:
        """dtype: of the weights that were quantised; the others come as they are stored."""
        self._stored, self._scheme, self._dtype = stored, scheme, dtype

    @property
    def names(self) -> frozenset[str]:
        """What can be asked for, and the tensors as they are stored."""
        packed = (name.removesuffix(".qweight") for name in self._stored.names if name.endswith(".qweight"))
        return self._stored.names | {module + WEIGHT for module in packed}

    def integers(self, name: str, shape: Sequence[int]) -> IntWeight | None:
        """The weight before it is multiplied out; None where it is not stored as integers."""
        module = name.removesuffix(WEIGHT)
        if not self._scheme.holds(self._stored, module):
            return None
        self._check_shape(name, module, shape)
        return self._scheme.integers(self._stored, module)

    def floats(self, name: str, shape: Sequence[int]) -> Fp8Weight | None:
        """The weight before it is multiplied out; None where it is not stored in FP8."""
        module = name.removesuffix(WEIGHT)
        if not isinstance(self._scheme, Fp8) or not self._scheme.holds(self._stored, module):
            return None
        self._check_shape(name, module, shape)
        return self._scheme.floats(self._stored, module)

    def require(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor, after checking its shape. Raises `CheckpointError`s."""
        module = name.removesuffix(WEIGHT)
        if not name.endswith(WEIGHT) or not self._scheme.holds(self._stored, module):
            return self._stored.require(name, shape)
        self._check_shape(name, module, shape)
        return self._scheme.weight(self._stored, module, self._dtype)

    def _check_shape(self, name: str, module: str, shape: Sequence[int]) -> None:
        found = self._scheme.shape(self._stored, module)
        if found != tuple(shape):
            raise ShapeMismatch(name, self._stored.folder, tuple(shape), found)
