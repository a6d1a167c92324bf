from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import BlockPoolExhausted
from pdserve.core.ids import AttemptId, BlockId, RequestId
from pdserve.engine.block_pool import BlockPool, Holder, HolderKind
from pdserve.engine.prefix_cache import PrefixCache, PrefixHashes

BLOCK = 4
ME = Holder(HolderKind.COMPUTE, AttemptId(RequestId("me"), 0))
YOU = Holder(HolderKind.COMPUTE, AttemptId(RequestId("you"), 0))


def cache_of(num_blocks: int, *, enabled: bool = True) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks)
    return pool, PrefixCache(pool, block_tokens=BLOCK, enabled=enabled)


def remember(cache: PrefixCache, pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[BlockId]:
    """A request computed `tokens`, its full blocks were inserted, and it is over."""
    hashes = PrefixHashes(salt, BLOCK).of(tokens)
    blocks = cache.allocate(len(hashes), ME)
    for digest, block in zip(hashes, blocks, strict=True):
        cache.insert(digest, block)
    pool.release_all(blocks, ME)
    return blocks


def hits(cache: PrefixCache, tokens: list[int], salt: bytes = b"") -> list[BlockId]:
    return cache.lookup(PrefixHashes(salt, BLOCK).of(tokens), len(tokens))


def test_a_request_finds_the_full_blocks_of_an_earlier_one() -> None:
    pool, cache = cache_of(8)
    blocks = remember(cache, pool, list(range(12)))
    assert hits(cache, [*range(12), 99]) == blocks
    assert hits(cache, [*range(8), 77, 78, 79, 80, 81]) == blocks[:2]


def test_the_last_prompt_token_is_always_computed() -> None:
    pool, cache = cache_of(8)
    blocks = remember(cache, pool, list(range(8)))
    assert hits(cache, list(range(8))) == blocks[:1]
    assert hits(cache, list(range(4))) == []


def test_an_empty_or_one_token_prompt_hits_nothing() -> None:
    _, cache = cache_of(1)
    assert hits(cache, [5]) == []


def test_another_salt_shares_nothing() -> None:
    pool, cache = cache_of(8)
    remember(cache, pool, list(range(12)), salt=b"tenant 1")
    assert hits(cache, list(range(13)), salt=b"tenant 2") == []


def test_equal_tokens_after_different_prefixes_are_different_blocks() -> None:
    pool, cache = cache_of(8)
    remember(cache, pool, [1, 2, 3, 4, 9, 9, 9, 9])
    assert hits(cache, [5, 6, 7, 8, 9, 9, 9, 9, 0]) == []


def test_claimed_blocks_are_held_and_counted_as_hits() -> None:
    pool, cache = cache_of(4)
    remember(cache, pool, list(range(8)))
    blocks = cache.claim(PrefixHashes(b"", BLOCK).of(list(range(9))), 9, YOU)
    assert len(blocks) == 2
    assert pool.counts().held == 2
    assert (cache.stats.hit_tokens, cache.stats.query_tokens) == (8, 9)


def test_the_longest_unused_block_is_evicted_first_and_a_tail_before_its_head() -> None:
    pool, cache = cache_of(4)
    old = remember(cache, pool, [1] * 8)
    new = remember(cache, pool, [2] * 8)
    taken = cache.allocate(1, YOU)
    assert taken == [old[1]]
    assert hits(cache, [1] * 9) == old[:1]
    assert hits(cache, [2] * 9) == new


def test_a_held_block_is_never_evicted() -> None:
    pool, cache = cache_of(2)
    remember(cache, pool, [1] * 8)
    cache.claim(PrefixHashes(b"", BLOCK).of([1] * 9), 9, YOU)
    with pytest.raises(BlockPoolExhausted):
        cache.allocate(1, ME)
    assert len(cache) == 2


def test_a_failed_allocation_evicts_nothing() -> None:
    pool, cache = cache_of(3)
    remember(cache, pool, [1] * 8)
    with pytest.raises(BlockPoolExhausted):
        cache.allocate(4, ME)
    assert len(cache) == 2
    assert pool.counts().cached == 2


def test_the_second_copy_of_a_block_is_not_kept() -> None:
    pool, cache = cache_of(4)
    remember(cache, pool, [1] * 4)
    remember(cache, pool, [1] * 4)
    assert pool.counts().cached == 1
    assert pool.counts().free == 3


def test_a_disabled_cache_keeps_nothing_and_allocates_all_the_same() -> None:
    pool, cache = cache_of(2, enabled=False)
    remember(cache, pool, [1] * 8)
    assert hits(cache, [1] * 9) == []
    assert pool.counts().free == 2


def test_clearing_gives_every_idle_block_back() -> None:
    pool, cache = cache_of(4)
    remember(cache, pool, [1] * 8)
    cache.clear()
    assert pool.counts().free == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(1, 5), max_size=8))
def test_hashing_in_pieces_equals_hashing_at_once(tokens: list[int], cuts: list[int]) -> None:
    growing, at = PrefixHashes(b"s", BLOCK), 0
    for cut in cuts:
        at = min(len(tokens), at + cut)
        growing.of(tokens[:at])
    assert growing.of(tokens) == PrefixHashes(b"s", BLOCK).of(tokens)
