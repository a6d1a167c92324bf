"""What the ranks of one tensor-parallel worker do together, as the model sees it.

Every rank calls the same of these in the same order, or the worker fails: nobody waits for ever.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """This rank among those that compute a model together."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """Of every rank's `x`, the same bits on each. One shape and dtype on all; `x` may be overwritten.

        Raises `WorkerLost`, as all of these do, when a rank does not come.
        """
        ...

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Every rank's `x`, in order, on rank 0; None on the others. One shape and dtype on all."""
        ...

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's `x`; the others' is overwritten with it."""
        ...

    def smallest(self, value: int) -> int:
        """Of every rank's value."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come here."""
        ...
