"""Cores that the CPU workers of one machine lend each other while they have nothing to compute.

Every worker pins cores of its own, so that prefill and decode do not slow each other. But a prompt that comes
when nobody decodes would be read with half the machine idle. So each worker says on a board whether it has
work, and those that may borrow compute on the cores of those that have none. In one of two ways:

- With kernels of our own (`pdcpu`), a helping thread is pinned to every core that might be lent. It looks at
  the board before each tile of a product, some ten microseconds of work, and sleeps while the owner is busy.
- With torch, a worker that may borrow widens its affinity and its number of threads from step to step: a
  lender waits for its cores for one step of the borrower at most.

The board is a mapped file with one byte per worker, 1 from the moment a worker has something to compute until
it has nothing left. A worker that died while busy lends nothing until its successor starts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pdcpu.library import HelperCore

_IDLE: Final = 0
_BUSY: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreShare:
    """One worker's place on the board, and whose cores are whose."""

    board: Path
    index: int
    cores: tuple[int, ...]
    others: tuple[tuple[int, tuple[int, ...]], ...]
    """(index, cores) of the other workers of this machine whose cores it may borrow."""
    borrows: bool
    """Whether torch, where it computes, borrows too. Not for short steps: each of its loops waits for the
    slowest thread. Kernels of our own always borrow: they see what it costs, and rest."""

    def among(self, allowed: Iterable[int]) -> CoreShare:
        """The same, when the numbers of cores were indices into `allowed`, wrapped around."""
        real = sorted(allowed)

        def cores(slots: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted({real[slot % len(real)] for slot in slots}))

        others = tuple((index, cores(slots)) for index, slots in self.others)
        return replace(self, cores=cores(self.cores), others=others)


class CoreLender:
    """Used by the compute thread alone: `enter` before each step, `leave` when there is nothing to compute.

    `use` is told the number of torch's threads whenever it changes; affinity is set for the calling thread,
    from which the threads of its matrix products inherit it.
    """

    def __init__(
        self,
        share: CoreShare,
        use: Callable[[int], None],
        set_helpers: Callable[[Sequence[HelperCore]], None] | None = None,
    ) -> None:
        """set_helpers: gives the engine's own kernels their threads; None where torch computes.

        Raises OSError when the board cannot be mapped.
        """
        self._share, self._use = share, use
        self._own = frozenset(share.cores)
        self._others = [(index, frozenset(cores)) for index, cores in share.others]
        self._board = _map_board(share.board, 1 + max([share.index, *(index for index, _ in self._others)]))
        self._board[share.index] = _IDLE
        self._using = self._own
        self._set_helpers = set_helpers
        if set_helpers is not None:
            # Torch is left with what is small; its threads would get in the way of the helpers.
            self._using = frozenset(share.cores[:1])
            self._pinned = False
            self._address = ctypes.addressof(ctypes.c_uint8.from_buffer(self._board))
            set_helpers(self._helpers())

    def enter(self) -> None:
        """There is something to compute: take back what is lent, and borrow what is free now."""
        self._board[self._share.index] = _BUSY
        if self._set_helpers is not None:
            if not self._pinned:
                os.sched_setaffinity(0, self._using)
                self._use(1)
                self._pinned = True
            return
        wanted = self._own | self._free() if self._share.borrows else self._own
        if wanted != self._using:
            os.sched_setaffinity(0, wanted)
            self._use(len(wanted))
            self._using = wanted

    def leave(self) -> None:
        """There is nothing to compute: others may use our cores."""
        self._board[self._share.index] = _IDLE

    def close(self) -> None:
        if self._set_helpers is not None:
            self._set_helpers(())
        self._board.close()

    def _helpers(self) -> list[HelperCore]:
        """One for every core of ours but the compute thread's, and for those of others who may be idle."""
        owners: dict[int, list[int]] = {core: [] for core in self._share.cores[1:]}
        for index, cores in self._others:
            for core in cores - self._own:
                owners.setdefault(core, []).append(self._address + index)
        return [HelperCore(core, tuple(addresses), self._board) for core, addresses in sorted(owners.items())]

    def _free(self) -> frozenset[int]:
        """Cores of which every owner is idle."""
        idle: frozenset[int] = frozenset()
        busy: frozenset[int] = frozenset()
        for index, cores in self._others:
            if self._board[index] == _BUSY:
                busy |= cores
            else:
                idle |= cores
        return idle - busy - self._own


def _map_board(path: Path, size: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)
