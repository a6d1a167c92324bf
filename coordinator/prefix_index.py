"""Which workers have the beginning of a prompt in their prefix cache, for every block of every worker.

A multimap from 64-bit block hashes to workers, in open addressing: the n-th worker that has block `h` stands
under the key `h + n * STRIDE (mod 2^64)`, so the holders of a block are found one after the other, spread
over the table however many they are, and the last one fills the gap that another leaves.

    partition (by the key's upper bits)    keys     array of uint64    0: empty
                                           owners   array of uint16    number of a worker

A partition of a few thousand entries doubles by itself, so that no growth is long. 10 bytes for a slot, about
half of which are taken; a Python set would need ten times that.

A block's hash covers all blocks before it, so who has block n has nearly always the blocks before it too: how
much of a prompt anyone has is found by bisection. It is a hint, not a promise: a block may be gone when the
request arrives there, and two of 2^64 hashes may meet; then a little more is read than was thought.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from pdserve.core.ids import WorkerId

MAX_BLOCKS: Final = 16_000_000
"""Entries at most, about 330 MB; what is stored beyond is not known of."""
HOLDERS: Final = 8
"""Of one block that a lookup lists at most, from a place in their row that the prompt's hash decides."""
_PARTITION_BITS: Final = 12
_STRIDE: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1
_SMALLEST: Final = 8
_MAX_WORKERS: Final = 2**16


class PrefixIndex:
    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max = max_blocks
        self._parts = [_NOTHING] * 2**_PARTITION_BITS
        self._numbers: dict[WorkerId, int] = {}
        self._names: dict[int, WorkerId] = {}
        self._free: list[int] = []
        self._sequence: dict[WorkerId, int] = {}
        self.num_blocks = 0
        self.num_dropped = 0
        """Blocks that were not taken in for want of room, since start."""

    @property
    def size_bytes(self) -> int:
        """Of the tables."""
        return sum(part.size_bytes for part in self._parts if part is not _NOTHING)

    # --- what workers say -----------------------------------------------------------------------------

    def heard(
        self,
        worker: WorkerId,
        sequence: int,
        stored: Iterable[int],
        evicted: Iterable[int],
        *,
        snapshot: bool,
    ) -> bool:
        """Keys of blocks that came and went. False: something before was missed; a snapshot is wanted, and
        until it comes nothing is known of this worker."""
        if snapshot:
            self.forget(worker)
        elif self._sequence.get(worker) != sequence - 1:
            self.forget(worker)
            return False
        self._sequence[worker] = sequence
        number = self._number(worker)
        for key in evicted:
            self._remove(key, number)
        for key in stored:
            self._insert(key, number)
        return True

    def forget(self, worker: WorkerId) -> None:
        """It is gone, or nothing certain is known of it any more."""
        self._sequence.pop(worker, None)
        number = self._numbers.pop(worker, None)
        if number is None:
            return
        del self._names[number]
        self._free.append(number)
        for part in self._parts:
            for key in part.keys_of(number):
                # An earlier removal in this loop may have put another worker's entry there.
                if part.get(key) == number:
                    self._fill_gap(key)
        self._purge(number)

    def _purge(self, number: int) -> None:
        """What moved behind the loop's back."""
        for part in self._parts:
            while keys := part.keys_of(number):
                self._fill_gap(keys[0])

    # --- what the router asks -------------------------------------------------------------------------

    def hits(self, keys: Sequence[int], below: PrefixIndex | None = None) -> dict[WorkerId, int]:
        """Workers that have a beginning of these blocks, with how many blocks of it, as far as is known.

        Those with the longest are among them, and some of those with less. below: what their tiers hold,
        which counts as well; of a worker that let go of the beginning, what follows is of no use.
        """
        found: dict[WorkerId, int] = {}
        indices = (self,) if below is None else (self, below)
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high + 1) // 2
            holders = [name for index in indices for name in index._holders(keys[middle - 1])]
            if below is not None:
                holders = [name for name in holders if any(index._has(keys[0], name) for index in indices)]
            if not holders:
                high = middle - 1
                continue
            low = middle
            for name in holders:
                found[name] = max(found.get(name, 0), middle)
        return found

    def _has(self, key: int, worker: WorkerId) -> bool:
        number, at = self._numbers.get(worker), key
        while number is not None and (found := self._get(at)) is not None:
            if found == number:
                return True
            at = (at + _STRIDE) & _MASK
        return False

    def _holders(self, key: int) -> list[WorkerId]:
        count = self._count(key)
        first = 0 if count <= HOLDERS else (key >> 20) % count
        found = []
        for index in range(min(count, HOLDERS)):
            number = self._get((key + (first + index) % count * _STRIDE) & _MASK)
            if number is not None:
                found.append(self._names[number])
        return found

    # --- rows of holders ------------------------------------------------------------------------------

    def _number(self, worker: WorkerId) -> int:
        number = self._numbers.get(worker)
        if number is None:
            number = self._free.pop() if self._free else len(self._numbers)
            if number >= _MAX_WORKERS:
                raise ValueError(f"{_MAX_WORKERS} workers, the most there may be, are known already")
            self._numbers[worker] = number
            self._names[number] = worker
        return number

    def _get(self, key: int) -> int | None:
        return self._parts[key >> (64 - _PARTITION_BITS)].get(key)

    def _put(self, key: int, owner: int) -> None:
        at = key >> (64 - _PARTITION_BITS)
        if self._parts[at] is _NOTHING:
            self._parts[at] = _Partition()
        self._parts[at].put(key, owner)

    def _count(self, key: int) -> int:
        """How many hold it: the length of its row, by doubling and bisection."""
        if self._get(key) is None:
            return 0
        low, high = 0, 1
        while self._get((key + high * _STRIDE) & _MASK) is not None:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._get((key + middle * _STRIDE) & _MASK) is None:
                high = middle
            else:
                low = middle
        return high

    def _insert(self, key: int, number: int) -> None:
        if self.num_blocks >= self._max:
            self.num_dropped += 1
            return
        at = (key + self._count(key) * _STRIDE) & _MASK
        self._put(at, number)
        self.num_blocks += 1

    def _remove(self, key: int, number: int) -> None:
        at = key
        while (found := self._get(at)) is not None:
            if found == number:
                self._fill_gap(at)
                return
            at = (at + _STRIDE) & _MASK

    def _fill_gap(self, key: int) -> None:
        """Take out one of a row; the last of the row takes its place."""
        last = (key + (self._count(key) - 1) * _STRIDE) & _MASK
        owner = self._parts[last >> (64 - _PARTITION_BITS)].pop(last)
        if last != key:
            self._put(key, owner)
        self.num_blocks -= 1


class _Partition:
    """Linear probing; a removed entry leaves no mark, as those behind it move up."""

    __slots__ = ("_count", "_keys", "_mask", "_owners")

    def __init__(self) -> None:
        self._keys, self._owners = array("Q", bytes(8 * _SMALLEST)), array("H", bytes(2 * _SMALLEST))
        self._mask = _SMALLEST - 1
        self._count = 0

    @property
    def size_bytes(self) -> int:
        return (self._mask + 1) * 10

    def get(self, key: int) -> int | None:
        key = key or 1
        keys, mask, slot = self._keys, self._mask, key & self._mask
        while found := keys[slot]:
            if found == key:
                return self._owners[slot]
            slot = (slot + 1) & mask
        return None

    def put(self, key: int, owner: int) -> None:
        key = key or 1
        keys, mask = self._keys, self._mask
        slot = key & mask
        while (found := keys[slot]) and found != key:
            slot = (slot + 1) & mask
        self._owners[slot] = owner
        if found:
            return
        keys[slot] = key
        self._count += 1
        if 10 * self._count > 7 * (mask + 1):
            self._grow()

    def pop(self, key: int) -> int:
        key = key or 1
        keys, owners, mask = self._keys, self._owners, self._mask
        slot = key & mask
        while keys[slot] != key:
            slot = (slot + 1) & mask
        owner, self._count = owners[slot], self._count - 1
        gap = slot
        while keys[slot := (slot + 1) & mask]:
            # What lies between its home and here may not move past its home.
            if (slot - keys[slot]) & mask >= (slot - gap) & mask:
                keys[gap], owners[gap] = keys[slot], owners[slot]
                gap = slot
        keys[gap] = 0
        return owner

    def keys_of(self, owner: int) -> list[int]:
        slots = np.flatnonzero(np.frombuffer(self._owners, dtype=np.uint16) == owner)
        return [key for slot in slots if (key := self._keys[slot])]

    def _grow(self) -> None:
        entries = list(zip(self._keys, self._owners, strict=True))
        size = 2 * (self._mask + 1)
        self._keys, self._owners = array("Q", bytes(8 * size)), array("H", bytes(2 * size))
        self._mask, self._count = size - 1, 0
        for key, owner in entries:
            if key:
                self.put(key, owner)


_NOTHING: Final = _Partition()
"""Stands where nothing has been put yet."""
