"""Which blocks of a prompt to send when.

chunk:     |---- blocks of an earlier chunk ----|==== this chunk ====|
layers:    [0, 8) pushed while [8, 16) computes ... the last group of the last chunk waits for the first
           token, and carries the hand-over.
"""

from __future__ import annotations

from pdserve.core.layout import blocks_for


def blocks_to_push(*, start: int, end: int, final: bool, dst_cached_tokens: int, block_tokens: int) -> range:
    """Indices, in the sequence's block table, of what a chunk [start, end) lets be sent.

    A chunk that is not the last ends on a block boundary; the last one sends its partial block too. Blocks
    that the decode worker has in its cache are left out.
    """
    last = blocks_for(end, block_tokens) if final else end // block_tokens
    return range(max(start, dst_cached_tokens) // block_tokens, last)
