"""What moves between pool and tiers, in any order of events: no block is lost, reused early or mistaken."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.prefix_index import PrefixIndex
from pdserve.core.errors import BlockPoolExhausted
from pdserve.core.ids import AttemptId, RequestId, WorkerId
from pdserve.core.prefix import key_of, keys_of
from pdserve.core.worker_state import PrefixEvents, TierCounts
from pdserve.engine.block_pool import BlockPool, Holder, HolderKind
from pdserve.engine.prefix_cache import BlockHash, PrefixCache, PrefixHashes
from pdserve.engine.tiers.store import (
    BlocksLoaded,
    BlockStored,
    LoadBlocks,
    StoreBlock,
    Tier,
    TierCommand,
    TiersFailed,
)
from pdserve.worker.events import OwnerId
from pdserve.worker.prefix_feed import PrefixFeed
from pdserve.worker.tiering import MAX_STORES, Fetch, Tiering

SIZE = 4
WORKER = WorkerId("prefill-0")
NUM_BLOCKS = 12


class SlowStore:
    """`TierPort`: does what it was told when the test says so, on the pool's "memory"."""

    def __init__(self, memory: list[BlockHash | None]) -> None:
        self.memory, self.kept, self.waiting = memory, set[BlockHash](), list[TierCommand]()
        self.cost_s = 0.0
        self.told = set[BlockHash]()

    def start(self) -> None: ...

    def submit(self, command: TierCommand) -> None:
        self.waiting.append(command)

    def find(self, digests: Sequence[BlockHash]) -> list[Tier]:
        found: list[Tier] = []
        for digest in digests:
            if digest not in self.kept:
                break
            found.append(Tier.HOST)
        return found

    def holds(self, digest: BlockHash) -> bool:
        return digest in self.kept

    def seconds(self, tiers: Sequence[Tier]) -> float:
        return self.cost_s

    def counts(self) -> TierCounts:
        return TierCounts()

    def changes(self) -> list[tuple[BlockHash, bool]]:
        told = [(digest, digest in self.kept) for digest in self.kept ^ self.told]
        self.told = set(self.kept)
        return told

    def stop(self) -> None: ...

    def join(self, timeout_s: float | None = None) -> bool:
        return True

    def work(self, index: int, lose: int) -> BlockStored | BlocksLoaded:
        """One command, in any order; of a load the last `lose` blocks are not there any more."""
        command = self.waiting.pop(index % len(self.waiting))
        if isinstance(command, StoreBlock):
            assert self.memory[command.block] == command.digest, "the block was reused while it was read"
            self.kept.add(command.digest)
            return BlockStored(command.digest)
        assert isinstance(command, LoadBlocks)
        num_loaded = max(len(command.blocks) - lose, 0)
        for digest, block in zip(command.digests[:num_loaded], command.blocks, strict=False):
            self.memory[block] = digest
        return BlocksLoaded(command.ticket, num_loaded)


class World:
    def __init__(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.cache = PrefixCache(self.pool, block_tokens=SIZE, enabled=True)
        self.memory: list[BlockHash | None] = [None] * NUM_BLOCKS
        self.store = SlowStore(self.memory)
        self.tiering = Tiering(self.pool, self.cache, self.store, block_tokens=SIZE)
        self.fetches: list[Fetch] = []
        self._ids = 0

    def read(self, tokens: list[int]) -> int | None:
        """A request computes a prompt and is over; how many tokens it found. None: there was no room."""
        self._ids += 1
        me = Holder(HolderKind.COMPUTE, AttemptId(RequestId(f"r{self._ids}"), 0))
        digests = PrefixHashes(b"", SIZE).of(tokens)
        taken = self.cache.reserve(
            digests, len(tokens), total=-(-len(tokens) // SIZE), cached_holder=me, fresh_holder=me
        )
        if taken is None:
            return None
        for digest, block in zip(digests, taken.cached, strict=False):
            assert self.memory[block] == digest, "a cached block holds something else"
        blocks = [*taken.cached, *taken.fresh]
        for block in taken.fresh:
            self.memory[block] = None
        for digest, block in zip(digests, blocks, strict=False):
            self.memory[block] = digest
            self.cache.insert(digest, block)
        self.pool.release_all(blocks, me)
        return len(taken.cached) * SIZE

    def fetch(self, tokens: list[int], speed: float = 0.0) -> Fetch | None:
        fetch = self.tiering.fetch(PrefixHashes(b"", SIZE).of(tokens), len(tokens), speed)
        if fetch is not None:
            self.fetches.append(fetch)
        return fetch

    def perform(self) -> None:
        for command in self.tiering.commands():
            self.store.submit(command)

    def work(self, index: int = 0, lose: int = 0) -> None:
        self.tiering.handle(self.store.work(index, lose))

    def settle(self) -> None:
        self.perform()
        while self.store.waiting:
            self.work()
            self.perform()


def prompt_of(seed: int, blocks: int, shared: int = 0) -> list[int]:
    tokens = random.Random(0).choices(range(50), k=shared * SIZE)
    return [*tokens, *random.Random(seed).choices(range(50), k=(blocks - shared) * SIZE), 7]


def test_coordinators_hear_what_the_tiers_hold_until_they_fail() -> None:
    world, cached, below = World(), PrefixIndex(), PrefixIndex()
    feed = PrefixFeed(WORKER, 1, world.cache, world.tiering)

    def hear() -> None:
        for send in feed.due():
            message = send.message
            assert isinstance(message, PrefixEvents)
            for index, stored, evicted in (
                (cached, message.stored, message.evicted),
                (below, message.tier_stored, message.tier_evicted),
            ):
                assert index.heard(
                    WORKER, message.sequence, keys_of(stored), keys_of(evicted), snapshot=message.snapshot
                )

    first, second = prompt_of(1, 8), prompt_of(2, 8)
    keys = [key_of(digest) for digest in PrefixHashes(b"", SIZE).of(first)][:8]
    world.read(first)
    world.settle()
    feed.met(OwnerId(1))
    hear()
    assert below.num_blocks == 8
    world.read(second)
    world.settle()
    hear()
    assert (cached.num_blocks, below.num_blocks) == (NUM_BLOCKS - 1, 16)
    assert cached.hits(keys, below) == {WORKER: 8}
    world.tiering.handle(TiersFailed("broken"))
    hear()
    assert below.num_blocks == 0


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "fetch", "work", "work", "perform"]),
        st.integers(0, 5),
        st.integers(1, 6),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(steps=_STEPS, fails=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_order_of_events_keeps_every_block(steps: list[tuple[str, int, int, int]], fails: bool) -> None:
    world = World()
    for what, seed, blocks, extra in steps:
        match what:
            case "read":
                world.read(prompt_of(seed, blocks, min(extra, blocks)))
            case "fetch":
                world.fetch(prompt_of(seed, blocks, min(extra, blocks)))
            case "work" if world.store.waiting:
                world.work(seed, extra)
            case _:
                world.perform()
        world.pool.audit()
    if fails:
        world.tiering.handle(TiersFailed("stopped"))
    else:
        world.settle()
    world.pool.audit()
    assert world.pool.counts().held == 0
    assert all(fetch.done for fetch in world.fetches)


def filled() -> tuple[World, list[int]]:
    """A prompt that was read, stored, and evicted."""
    world, prompt = World(), prompt_of(1, 8)
    world.read(prompt)
    world.settle()
    world.read(prompt_of(2, 11))
    world.settle()
    return world, prompt


def test_a_prompt_waits_for_its_prefix_and_then_finds_it() -> None:
    world, prompt = filled()
    assert world.cache.lookup(PrefixHashes(b"", SIZE).of(prompt), len(prompt)) == []
    fetch = world.fetch(prompt)
    assert fetch is not None
    assert not fetch.done
    world.perform()
    world.work()
    assert fetch.done
    assert world.read(prompt) == 8 * SIZE


def test_prompts_that_begin_alike_wait_for_one_load() -> None:
    world, prompt = filled()
    first, second = world.fetch(prompt), world.fetch([*prompt[:-1], 9, 9])
    assert first is second
    world.perform()
    assert len(world.store.waiting) == 1


@pytest.mark.parametrize(("cost_s", "waits"), [(0.031, False), (0.033, False), (0.03, True)])
def test_what_is_computed_as_fast_is_not_loaded(cost_s: float, waits: bool) -> None:
    world, prompt = filled()
    world.store.cost_s = cost_s
    fetch = world.fetch(prompt, speed=32 / 0.031)
    assert fetch is not None
    assert fetch.done != waits


def test_a_prompt_for_which_the_pool_has_no_room_asks_again_later() -> None:
    world, prompt = filled()
    me = Holder(HolderKind.COMPUTE, AttemptId(RequestId("holds"), 0))
    blocks = world.cache.allocate(8, me)
    assert world.fetch(prompt) is None
    world.pool.release_all(blocks, me)
    assert world.fetch(prompt) is not None


def test_blocks_are_copied_out_a_few_at_a_time_and_those_evicted_before_are_counted() -> None:
    pool = BlockPool(64)
    cache = PrefixCache(pool, block_tokens=SIZE, enabled=True)
    store = SlowStore([None] * 64)
    tiering = Tiering(pool, cache, store, block_tokens=SIZE)
    me = Holder(HolderKind.COMPUTE, AttemptId(RequestId("me"), 0))
    blocks = cache.allocate(64, me)
    for digest, block in zip(PrefixHashes(b"", SIZE).of(list(range(64 * SIZE))), blocks, strict=True):
        cache.insert(digest, block)
    pool.release_all(blocks, me)
    assert len(tiering.commands()) == MAX_STORES
    assert pool.counts().held == MAX_STORES
    with pytest.raises(BlockPoolExhausted):
        cache.allocate(64 - MAX_STORES + 1, me)
    cache.allocate(64 - MAX_STORES, me)
    for command in [BlockStored(PrefixHashes(b"", SIZE).of(list(range(64 * SIZE)))[i]) for i in range(16)]:
        tiering.handle(command)
    tiering.commands()
    assert tiering.counts().missed_blocks == 64 - MAX_STORES


def test_after_a_failure_nothing_is_stored_or_waited_for() -> None:
    world, prompt = filled()
    fetch = world.fetch(prompt)
    world.tiering.handle(TiersFailed("the disk is gone"))
    assert fetch is not None
    assert fetch.done
    world.read(prompt_of(5, 4))
    assert world.tiering.commands() == []
    assert world.pool.counts().held == 0
