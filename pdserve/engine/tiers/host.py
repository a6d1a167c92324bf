"""Blocks in host memory: one allocation of slots, the longest unused given up first."""

from __future__ import annotations

import mmap
from collections import OrderedDict

import numpy as np

from pdserve.engine.prefix_cache import BlockHash
from pdserve.engine.tiers.blocks import Bytes


class HostTier:
    """At most `size_bytes` of blocks. The operating system gives the pages as they are first written.

    Used by one thread, but for `in`: the directory is changed with single dict operations.
    """

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self.num_slots = size_bytes // block_bytes
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._slot_of: OrderedDict[BlockHash, int] = OrderedDict()
        self._slots: Bytes = np.empty((0, block_bytes), dtype=np.uint8)
        if self.num_slots:
            memory = mmap.mmap(-1, self.num_slots * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._slots = np.frombuffer(memory, dtype=np.uint8).reshape(self.num_slots, block_bytes)

    def __contains__(self, digest: BlockHash) -> bool:
        return digest in self._slot_of

    @property
    def used_bytes(self) -> int:
        return len(self._slot_of) * self._block_bytes

    @property
    def full(self) -> bool:
        return not self._free

    def get(self, digest: BlockHash) -> Bytes | None:
        """The block's bytes, which are the newest now."""
        slot = self._slot_of.get(digest)
        if slot is None:
            return None
        self._slot_of.move_to_end(digest)
        data: Bytes = self._slots[slot]
        return data

    def oldest(self) -> tuple[BlockHash, Bytes]:
        """Raises StopIteration when there is none."""
        digest, slot = next(iter(self._slot_of.items()))
        return digest, self._slots[slot]

    def drop(self, digest: BlockHash) -> None:
        self._free.append(self._slot_of.pop(digest))

    def room(self) -> Bytes:
        """A free slot to fill before `keep`. Raises IndexError when it is full."""
        slot: Bytes = self._slots[self._free[-1]]
        return slot

    def keep(self, digest: BlockHash) -> None:
        """What was written into `room` is this block."""
        self._slot_of[digest] = self._free.pop()
