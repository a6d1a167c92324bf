"""Host and disk tier with real memory and real files: what goes in comes out, or is a miss."""

from __future__ import annotations

import errno
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.ids import BlockId
from pdserve.core.layout import CacheGroup, GroupLayout
from pdserve.engine.prefix_cache import BlockHash
from pdserve.engine.tiers.blocks import HostBlocks
from pdserve.engine.tiers.disk import DiskTier
from pdserve.engine.tiers.host import HostTier
from pdserve.engine.tiers.store import (
    BlocksLoaded,
    BlockStored,
    LoadBlocks,
    StoreBlock,
    Tier,
    TierEvent,
    TiersFailed,
    TierStore,
)

LAYOUT = GroupLayout(
    group=CacheGroup(name="kv", num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32"), block_tokens=4
)
SIZE = LAYOUT.block_bytes
NUM_BLOCKS = 12
ME = b"m" * 32


def digest_of(index: int) -> BlockHash:
    return BlockHash(index.to_bytes(16, "big"))


class Bench:
    """A pool of random blocks over some tiers."""

    def __init__(self, host_blocks: int, disk: DiskTier | None, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.pool = rng.integers(0, 256, (NUM_BLOCKS, SIZE), dtype=np.uint8)
        self.before = self.pool.copy()
        self.events: queue.Queue[TierEvent] = queue.Queue()
        self.store = TierStore(
            HostBlocks(self.pool.ctypes.data, LAYOUT, NUM_BLOCKS),
            HostTier(host_blocks * SIZE, SIZE),
            disk,
            self.events.put,
            block_tokens=LAYOUT.block_tokens,
        )
        self.store.start()
        self._tickets = 0

    def keep(self, *blocks: int) -> None:
        for block in blocks:
            self.store.submit(StoreBlock(digest_of(block), BlockId(block)))
            assert self.events.get(timeout=10) == BlockStored(digest_of(block))

    def load(self, *indices: int) -> int:
        """Into the same blocks, overwritten before; how many came."""
        self.pool[list(indices)] = 0xEE
        self._tickets += 1
        self.store.submit(
            LoadBlocks(
                self._tickets, tuple(digest_of(i) for i in indices), tuple(BlockId(i) for i in indices)
            )
        )
        event = self.events.get(timeout=10)
        assert isinstance(event, BlocksLoaded)
        assert event.ticket == self._tickets
        for index in indices[: event.num_loaded]:
            np.testing.assert_array_equal(self.pool[index], self.before[index])
        return event.num_loaded

    def where(self, *indices: int) -> list[Tier]:
        return self.store.find([digest_of(i) for i in indices])


def disk_at(path: Path, *, blocks: int = 100, identity: bytes = ME) -> DiskTier:
    return DiskTier(path, blocks * (SIZE + 200), SIZE, identity)


@contextmanager
def bench(host_blocks: int, disk: DiskTier | None = None) -> Iterator[Bench]:
    made = Bench(host_blocks, disk)
    try:
        yield made
    finally:
        made.store.stop()
        assert made.store.join(10)
    assert made.events.get(timeout=10) == TiersFailed("stopped")


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*.kv"))


def test_a_block_comes_back_from_host_memory_as_it_was() -> None:
    with bench(4) as it:
        it.keep(0, 1, 2)
        assert it.where(0, 1, 2, 3) == [Tier.HOST] * 3
        assert it.load(2, 0, 1) == 3
        counts = it.store.counts()
        assert (counts.host_hit_tokens, counts.host_bytes) == (12, 3 * SIZE)


def test_what_came_and_went_is_told_once(tmp_path: Path) -> None:
    with bench(2, disk_at(tmp_path, blocks=2)) as it:
        it.keep(0, 1, 2)
        assert dict(it.store.changes()) == {digest_of(i): True for i in range(3)}
        it.keep(3, 4, 5)
        told = dict(it.store.changes())
        assert {digest for digest, here in told.items() if not here} == {digest_of(0), digest_of(1)}
        assert all(told[digest_of(i)] for i in (3, 4, 5))
        assert it.store.changes() == []
    with bench(0, disk_at(tmp_path)) as again:
        assert dict(again.store.changes()) == {digest_of(2): True, digest_of(3): True}


def test_a_full_host_tier_gives_up_the_longest_unused() -> None:
    with bench(2) as it:
        it.keep(0, 1)
        assert it.load(0) == 1
        it.keep(2)
        assert [it.where(i) for i in range(3)] == [[Tier.HOST], [], [Tier.HOST]]
        assert it.store.counts().dropped_blocks == 1


def test_what_host_memory_gives_up_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    with bench(2, disk_at(tmp_path)) as it:
        it.keep(*range(6))
        assert it.where(*range(6)) == [Tier.DISK] * 4 + [Tier.HOST] * 2
        assert it.load(*range(6)) == 6
        counts = it.store.counts()
        assert (counts.disk_hit_tokens, counts.host_hit_tokens, counts.dropped_blocks) == (16, 8, 0)


def test_the_disk_tier_works_without_a_host_tier(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(3)
        assert it.load(3) == 1


def test_the_disk_tier_stays_within_its_bound(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path, blocks=3)) as it:
        it.keep(*range(8))
        assert len(files(tmp_path)) == 3
        assert it.where(7, 6, 5, 4) == [Tier.DISK] * 3
        assert it.store.counts().dropped_blocks == 5


def test_blocks_on_disk_survive_a_restart(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0, 1)
    with bench(0, disk_at(tmp_path)) as again:
        assert again.load(0, 1) == 2


def test_another_models_blocks_are_removed_at_start(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0, 1)
    with bench(0, disk_at(tmp_path, identity=b"o" * 32)) as other:
        assert other.where(0) == []
        assert files(tmp_path) == []


@pytest.mark.parametrize("at", [0, 20, 44, 70, 71, 300, -1])
def test_a_flipped_byte_anywhere_in_a_file_is_a_miss(tmp_path: Path, at: int) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0, 1)
        data = bytearray(files(tmp_path)[1].read_bytes())
        data[at] ^= 0x10
        files(tmp_path)[1].write_bytes(data)
        assert it.load(0, 1) == 1
        assert it.store.counts().corrupt_blocks == 1
        assert it.where(1) == []
        it.pool[1] = it.before[1]
        it.keep(1)
        assert it.load(1) == 1


@pytest.mark.parametrize("kept", [0, 10, 100])
def test_a_torn_file_is_a_miss(tmp_path: Path, kept: int) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0)
        os.truncate(files(tmp_path)[0], kept)
        assert it.load(0) == 0
        assert it.store.counts().corrupt_blocks == 1


def test_a_file_that_was_torn_by_a_crash_is_removed_at_start(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0, 1)
    os.truncate(files(tmp_path)[0], 50)
    (tmp_path / "half.new").write_bytes(b"x")
    (tmp_path / "nohash.kv").write_bytes(b"x")
    with bench(0, disk_at(tmp_path)) as again:
        assert again.where(0) == []
        assert again.load(1) == 1
        assert len(files(tmp_path)) == 1
        assert not (tmp_path / "half.new").exists()


def test_one_blocks_bytes_under_anothers_name_are_a_miss(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0, 1)
        first, second = files(tmp_path)
        second.write_bytes(first.read_bytes())
        assert it.load(1) == 0
        assert it.store.counts().corrupt_blocks == 1


def test_a_file_that_somebody_removed_is_a_miss(tmp_path: Path) -> None:
    with bench(0, disk_at(tmp_path)) as it:
        it.keep(0)
        files(tmp_path)[0].unlink()
        assert it.load(0) == 0
        assert it.where(0) == []


def test_a_disk_that_fills_up_makes_room_among_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev

    def full(fd: int, parts: list[bytes]) -> int:
        if len(files(tmp_path)) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, parts)

    with bench(0, disk_at(tmp_path)) as it:
        monkeypatch.setattr(os, "writev", full)
        it.keep(0, 1, 2, 3)
        assert it.store.counts().io_errors == 1
        assert it.where(2) == []
        assert it.where(3, 1) == [Tier.DISK] * 2
        assert it.load(3) == 1
        assert not list(tmp_path.glob("*.new"))


def test_a_disk_that_takes_a_part_of_a_block_keeps_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev
    with bench(1, disk_at(tmp_path)) as it:
        monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [parts[0]]))
        it.keep(0, 1)
        assert it.where(0) == []
        assert it.store.counts().io_errors == 1
        assert list(tmp_path.glob("*.*")) == []


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    first = disk_at(tmp_path)
    try:
        with pytest.raises(ConfigError, match="in use by another"):
            disk_at(tmp_path)
    finally:
        first.close()


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="disk_tier_path"):
        disk_at(tmp_path / "file")


def test_loading_is_expected_to_take_as_long_as_it_took() -> None:
    with bench(4) as it:
        it.keep(0)
        for _ in range(30):
            it.load(0)
        assert it.store.seconds([Tier.HOST]) < it.store.seconds([Tier.DISK] * 1000)
