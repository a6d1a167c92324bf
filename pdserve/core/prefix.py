"""Which prompts begin alike: chained hashes of full blocks of tokens.

The hash of a block covers its tokens and, through the chain, every token before it and the salt (model,
adapter, KV dtype, tenant). 128 bits of BLAKE2b: two different prefixes that meet are not expected in the life
of a deployment, and none can be made on purpose. Where only speed is at stake, as in routing, the first 64
bits do.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final, NewType

BlockHash = NewType("BlockHash", bytes)

_DIGEST_BYTES: Final = 16
KEY_BYTES: Final = 8


class PrefixHashes:
    """The chained hashes of one growing sequence, each computed once."""

    def __init__(self, salt: bytes, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._root = blake2b(salt, digest_size=_DIGEST_BYTES, person=b"pdserve-prefix").digest()
        self._hashes: list[BlockHash] = []

    def of(self, tokens: Sequence[int]) -> list[BlockHash]:
        """Hashes of the full blocks of `tokens`, which extend what was given before."""
        size = self._block_tokens
        for index in range(len(self._hashes), len(tokens) // size):
            parent = self._hashes[-1] if self._hashes else self._root
            chunk = array("q", tokens[index * size : (index + 1) * size])
            self._hashes.append(
                BlockHash(blake2b(parent + chunk.tobytes(), digest_size=_DIGEST_BYTES).digest())
            )
        return self._hashes[: len(tokens) // size]


def pack_keys(hashes: Iterable[BlockHash]) -> bytes:
    """The first 64 bits of each, one after the other, for the wire."""
    return b"".join(digest[:KEY_BYTES] for digest in hashes)


def keys_of(packed: bytes) -> list[int]:
    """What `pack_keys` packed, as numbers. Raises ValueError for a length that is no multiple of 8."""
    if len(packed) % KEY_BYTES:
        raise ValueError(f"{len(packed)} bytes of keys, wanted a multiple of {KEY_BYTES}")
    return [int.from_bytes(packed[at : at + KEY_BYTES], "little") for at in range(0, len(packed), KEY_BYTES)]


def key_of(digest: BlockHash) -> int:
    return int.from_bytes(digest[:KEY_BYTES], "little")
