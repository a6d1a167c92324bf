"""What every way of storing quantised weights answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pdserve.models.quantization.integers import IntWeight


class StoredTensors(Protocol):
    """The part of `Checkpoint` that a scheme reads from. `get` and the rest raise `MissingTensor`."""

    @property
    def names(self) -> frozenset[str]: ...
    @property
    def folder(self) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> Tensor: ...
    def require(self, name: str, shape: Sequence[int]) -> Tensor: ...


class Scheme(Protocol):
    """How the weights of a checkpoint's quantised modules are stored.

    Which modules are quantised is seen in the tensors, not in the config's lists of exceptions: those have a
    spelling of their own in every tool (prefixes, globs, regular expressions), the tensors cannot be wrong.
    """

    @property
    def name(self) -> str:
        """For messages, such as `GPTQ 4 bit, groups of 128`."""
        ...

    def holds(self, stored: StoredTensors, module: str) -> bool:
        """Whether this module's weight is stored quantised."""
        ...

    def shape(self, stored: StoredTensors, module: str) -> tuple[int, int]:
        """(outputs, inputs) of its weight. Raises `CheckpointError` for tensors that do not fit together."""
        ...

    def weight(self, stored: StoredTensors, module: str, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs], computed in float32 and rounded once to dtype."""
        ...

    def integers(self, stored: StoredTensors, module: str) -> IntWeight | None:
        """The weight before it is multiplied out, where it is stored as integers."""
        ...
