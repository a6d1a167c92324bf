"""Who has the beginning of a prompt: against a plain dictionary, and at its bounds."""

from __future__ import annotations

import random

import pytest

from coordinator.prefix_index import HOLDERS, PrefixIndex
from pdserve.core.ids import WorkerId
from pdserve.core.prefix import PrefixHashes, key_of, keys_of, pack_keys


def name(number: int) -> WorkerId:
    return WorkerId(f"w{number}")


def known(num_workers: int, blocks: list[int]) -> PrefixIndex:
    index = PrefixIndex()
    for number in range(num_workers):
        assert index.heard(name(number), 1, blocks, [], snapshot=True)
    return index


def test_the_longest_beginning_that_anyone_has_is_found_with_those_who_have_less() -> None:
    index, chain = PrefixIndex(), list(range(1, 33))
    for number, length in enumerate((4, 32, 16)):
        index.heard(name(number), 1, chain[:length], [], snapshot=True)
    assert index.hits(chain) == {name(1): 32, name(2): 16}
    assert index.hits(chain[:6]) == {name(0): 3, name(1): 6, name(2): 6}
    assert index.hits([99, 98, 97]) == {}
    assert index.hits([]) == {}


def test_what_lies_in_tiers_continues_what_is_cached_unless_the_beginning_is_gone() -> None:
    index, below, chain = PrefixIndex(), PrefixIndex(), list(range(1, 33))
    index.heard(name(0), 1, chain[:8], [], snapshot=True)
    below.heard(name(0), 1, chain[4:24], [], snapshot=True)
    below.heard(name(1), 1, chain[:20], [], snapshot=True)
    below.heard(name(2), 1, chain[2:], [], snapshot=True)
    assert index.hits(chain) == {name(0): 8}
    assert index.hits(chain, below) == {name(0): 24, name(1): 16}
    assert index.hits(chain[:20], below) == {name(0): 20, name(1): 20}


def test_it_agrees_with_a_dictionary_whatever_comes_and_goes() -> None:
    rng, index = random.Random(7), PrefixIndex()
    blocks = [rng.getrandbits(64) for _ in range(300)] + [0, 2**64 - 1]
    held: dict[WorkerId, set[int]] = {name(number): set() for number in range(12)}
    sequence = dict.fromkeys(held, 0)
    for worker in held:
        index.heard(worker, 0, [], [], snapshot=True)
    for _ in range(1500):
        worker = rng.choice(list(held))
        if rng.random() < 0.004:
            index.forget(worker)
            held[worker], sequence[worker] = set(), 0
            index.heard(worker, 0, [], [], snapshot=True)
            continue
        stored = set(rng.sample(blocks, 3)) - held[worker]
        gone = set(rng.sample(sorted(held[worker]), min(2, len(held[worker]))))
        sequence[worker] += 1
        assert index.heard(worker, sequence[worker], stored, gone, snapshot=False)
        held[worker] = (held[worker] | stored) - gone
    assert index.num_blocks == sum(map(len, held.values()))
    for block in blocks:
        holders = {worker for worker, kept in held.items() if block in kept}
        found = set(index.hits([block]))
        assert found <= holders
        assert len(found) == min(len(holders), HOLDERS)


def test_prompts_with_a_common_beginning_are_told_of_different_holders_of_it() -> None:
    rng = random.Random(0)
    common = [rng.getrandbits(64) for _ in range(20)]
    index = known(100, common)
    assert all(len(index.hits([block])) == HOLDERS for block in common)
    assert len({worker for block in common for worker in index.hits([block])}) > 50


def test_after_a_gap_nothing_is_known_until_a_snapshot_comes() -> None:
    index = known(1, [1, 2])
    assert index.heard(name(0), 2, [3], [], snapshot=False)
    assert not index.heard(name(0), 4, [4], [], snapshot=False)
    assert index.hits([1]) == {}
    assert index.num_blocks == 0
    assert not index.heard(name(0), 5, [5], [], snapshot=False)
    assert index.heard(name(0), 9, [1, 4], [], snapshot=True)
    assert index.hits([1]) == {name(0): 1}


def test_a_worker_that_is_gone_leaves_nothing_and_its_number_is_used_again() -> None:
    index = known(5, list(range(100, 600)))
    for _ in range(3):
        index.forget(name(2))
        assert index.num_blocks == 4 * 500
        assert name(2) not in index.hits([100])
        index.heard(WorkerId("another"), 1, [7], [], snapshot=True)
        assert index.hits([7]) == {WorkerId("another"): 1}
        index.forget(WorkerId("another"))
        index.heard(name(2), 1, range(100, 600), [], snapshot=True)
    assert index.num_blocks == 5 * 500


def test_memory_is_bounded() -> None:
    index, rng = PrefixIndex(max_blocks=1000), random.Random(0)
    index.heard(name(0), 1, [rng.getrandbits(64) for _ in range(1500)], [], snapshot=True)
    assert (index.num_blocks, index.num_dropped) == (1000, 500)
    index = PrefixIndex()
    index.heard(name(0), 1, [rng.getrandbits(64) for _ in range(60_000)], [], snapshot=True)
    assert index.size_bytes < 40 * index.num_blocks


def test_keys_cross_the_wire() -> None:
    hashes = PrefixHashes(b"salt", 4).of(list(range(17)))
    assert len(hashes) == 4
    assert keys_of(pack_keys(hashes)) == [key_of(digest) for digest in hashes]
    with pytest.raises(ValueError, match="9 bytes"):
        keys_of(b"123456789")
