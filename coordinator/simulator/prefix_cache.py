"""Which prompts' beginnings a modelled worker has, told in the product's own hashes of blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from coordinator.simulator.workload import PREFIX_BLOCK_TOKENS, is_shared
from pdserve.core.prefix import PrefixHashes, pack_keys


class BlockKeys:
    """Keys of the blocks that prompts have in common, each computed once for all workers of a world.

    A modelled prompt's tokens say which blocks it is made of: every token of a block is the block's own id,
    which is the same for equal beginnings alone (see `workload`). One such block is several of a worker's.
    """

    def __init__(self, block_tokens: int) -> None:
        self._size: Final = block_tokens
        self._known: dict[int, bytes] = {}

    def of(self, tokens: Sequence[int], at: int) -> bytes:
        """Packed keys of the block whose first token is number `at`; empty for what is a prompt's own."""
        block = tokens[at]
        if not is_shared(block) or PREFIX_BLOCK_TOKENS % self._size:
            return b""
        if block not in self._known:
            self._learn(tokens)
        return self._known[block]

    def _learn(self, tokens: Sequence[int]) -> None:
        """Of all blocks of a prompt that others may begin with."""
        hashes, each = PrefixHashes(b"", self._size).of(tokens), PREFIX_BLOCK_TOKENS // self._size
        for at in range(0, len(tokens) - PREFIX_BLOCK_TOKENS + 1, PREFIX_BLOCK_TOKENS):
            if is_shared(tokens[at]):
                first = at // self._size
                self._known[tokens[at]] = pack_keys(hashes[first : first + each])


class PrefixCache:
    """Blocks of prompts whose KV is here, the least recently used forgotten first."""

    def __init__(self, keys: BlockKeys) -> None:
        self._keys = keys
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        """Block ids, with the packed keys of each."""
        self.stored: list[bytes] = []
        self.evicted: list[bytes] = []
        """Not told yet."""
        self.hit_tokens = self.query_tokens = 0

    def held(self) -> bytes:
        """Keys of all blocks that others may ask for."""
        return b"".join(self._blocks.values())

    def ask(self, tokens: Sequence[int]) -> int:
        """How many tokens at the beginning of a prompt are here. Its last token is always left to read."""
        hit = self.has(tokens, len(tokens) - 1)
        self.query_tokens += len(tokens)
        self.hit_tokens += hit
        return hit

    def has(self, tokens: Sequence[int], most: int) -> int:
        """Tokens at the beginning that are here, `most` at most; they count as used now."""
        hit = 0
        while hit + PREFIX_BLOCK_TOKENS <= most and tokens[hit] in self._blocks:
            self._blocks.move_to_end(tokens[hit])
            hit += PREFIX_BLOCK_TOKENS
        return hit

    def add(self, tokens: Sequence[int], capacity_tokens: int) -> None:
        """Its full blocks. capacity_tokens: what the cache may hold now."""
        blocks = self._blocks
        for at in range(0, len(tokens) - PREFIX_BLOCK_TOKENS + 1, PREFIX_BLOCK_TOKENS):
            block = tokens[at]
            if block in blocks:
                blocks.move_to_end(block)
                continue
            keys = blocks[block] = self._keys.of(tokens, at)
            if keys:
                self.stored.append(keys)
        while len(blocks) > max(capacity_tokens, 0) // PREFIX_BLOCK_TOKENS:
            _, keys = blocks.popitem(last=False)
            if keys:
                self.evicted.append(keys)
