"""What a coordinator hears of a worker's prefix cache is what the cache holds."""

from __future__ import annotations

import random

from coordinator.prefix_index import PrefixIndex
from pdserve.core.codec import decode, encode
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.prefix import PrefixHashes, key_of, keys_of
from pdserve.core.worker_state import PrefixEvents
from pdserve.engine.block_pool import BlockPool, Holder, HolderKind
from pdserve.engine.prefix_cache import PrefixCache
from pdserve.worker.events import OwnerId, Send
from pdserve.worker.prefix_feed import PrefixFeed
from pdserve.worker.tiering import Tiering

WORKER = WorkerId("decode-0")
ONE, TWO = OwnerId(1), OwnerId(2)
BLOCK = 4


def hear(index: PrefixIndex, sends: list[Send], owner: OwnerId) -> list[bool]:
    told = []
    for send in sends:
        if send.owner == owner:
            message = decode(encode(send.message))
            assert isinstance(message, PrefixEvents)
            told.append(
                index.heard(
                    message.worker,
                    message.sequence,
                    keys_of(message.stored),
                    keys_of(message.evicted),
                    snapshot=message.snapshot,
                )
            )
    return told


class Requests:
    """Prompts of three blocks that come and go through a pool of twelve."""

    def __init__(self) -> None:
        self.pool = BlockPool(12)
        self.cache = PrefixCache(self.pool, block_tokens=BLOCK, enabled=True)
        self.tiering = Tiering(self.pool, self.cache, None, block_tokens=BLOCK)
        self._rng, self._count = random.Random(0), 0

    def one(self) -> None:
        self._count += 1
        holder = Holder(HolderKind.COMPUTE, AttemptId(RequestId(f"r{self._count}"), 0))
        tokens = [self._rng.randrange(3)] * BLOCK + [self._rng.randrange(3) for _ in range(2 * BLOCK + 1)]
        hashes = PrefixHashes(b"", BLOCK).of(tokens)
        taken = self.cache.reserve(hashes, len(tokens), total=4, cached_holder=holder, fresh_holder=holder)
        assert taken is not None
        blocks = [*taken.cached, *taken.fresh]
        for digest, block in zip(hashes, blocks, strict=False):
            self.cache.insert(digest, block)
        self.pool.release_all(blocks, holder)

    def keys(self) -> set[int]:
        return {key_of(digest) for digest in self.cache.hashes()}


def known(index: PrefixIndex, keys: set[int]) -> set[int]:
    return {key for key in keys if index.hits([key])}


def test_coordinators_that_come_at_different_times_know_the_same() -> None:
    requests, ever = Requests(), set[int]()
    feed, first, second = (
        PrefixFeed(WORKER, 1, requests.cache, requests.tiering),
        PrefixIndex(),
        PrefixIndex(),
    )
    requests.one()
    assert feed.due() == []
    feed.met(ONE)
    for step in range(60):
        if step == 30:
            feed.met(TWO)
        for _ in range(step % 3):
            requests.one()
        ever |= requests.keys()
        sends = feed.due()
        assert all(hear(first, sends, ONE))
        assert all(hear(second, sends, TWO))
        assert known(first, ever) == requests.keys()
        assert first.num_blocks == len(requests.keys())
        if step >= 30:
            assert known(second, ever) == requests.keys()


def test_who_missed_something_asks_and_gets_everything() -> None:
    requests, index = Requests(), PrefixIndex()
    feed = PrefixFeed(WORKER, 1, requests.cache, requests.tiering)
    feed.met(ONE)
    hear(index, feed.due(), ONE)
    requests.one()
    feed.due()
    requests.one()
    assert hear(index, feed.due(), ONE) == [False]
    feed.met(ONE)
    assert hear(index, feed.due(), ONE) == [True]
    assert known(index, requests.keys()) == requests.keys()


def test_nothing_is_written_down_for_nobody() -> None:
    requests = Requests()
    feed = PrefixFeed(WORKER, 1, requests.cache, requests.tiering)
    feed.met(ONE)
    feed.due()
    feed.lost(ONE)
    assert requests.cache.journal is None
    requests.one()
    assert feed.due() == []
