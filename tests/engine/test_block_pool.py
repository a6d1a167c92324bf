from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.errors import BlockPoolExhausted, InvariantViolated
from pdserve.core.ids import AttemptId, BlockId, RequestId
from pdserve.engine.block_pool import (
    CACHE_HOLDER,
    BlockPool,
    BlockState,
    Holder,
    HolderKind,
    quarantined_by,
)

A = AttemptId(RequestId("a"), 0)
B = AttemptId(RequestId("b"), 0)
COMPUTE_A = Holder(HolderKind.COMPUTE, A)
SENDER_A = Holder(HolderKind.SENDER, A)
RECEIVER_A = Holder(HolderKind.RECEIVER, A)
COMPUTE_B = Holder(HolderKind.COMPUTE, B)


def test_a_block_is_free_again_only_after_its_last_holder_let_go() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1, COMPUTE_A)
    pool.hold(block, SENDER_A)
    pool.release(block, COMPUTE_A)
    assert pool.state(block) is BlockState.HELD
    pool.release(block, SENDER_A)
    assert pool.state(block) is BlockState.FREE
    assert pool.num_free == 2
    pool.audit()


def test_an_allocation_that_does_not_fit_takes_nothing_and_says_what_was_wanted() -> None:
    pool = BlockPool(3)
    pool.allocate(1, COMPUTE_A)
    with pytest.raises(BlockPoolExhausted, match="wanted 3 KV blocks, 2 free"):
        pool.allocate(3, COMPUTE_B)
    assert pool.num_free == 2
    pool.audit()


def test_giving_a_block_back_twice_is_a_bug() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1, COMPUTE_A)
    pool.release(block, COMPUTE_A)
    with pytest.raises(InvariantViolated, match="nobody"):
        pool.release(block, COMPUTE_A)


def test_giving_back_anothers_block_is_a_bug() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1, COMPUTE_A)
    with pytest.raises(InvariantViolated, match="does not hold"):
        pool.release(block, COMPUTE_B)


def test_a_free_block_cannot_be_held_without_allocating_it() -> None:
    with pytest.raises(InvariantViolated, match="free"):
        BlockPool(1).hold(BlockId(0), COMPUTE_A)


def test_a_block_outside_the_pool_is_a_bug() -> None:
    with pytest.raises(InvariantViolated, match="not in this pool"):
        BlockPool(2).release(BlockId(-1), COMPUTE_A)


def test_a_block_that_another_may_read_cannot_be_written() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1, COMPUTE_A)
    pool.require_writable(block, COMPUTE_A)
    pool.hold(block, SENDER_A)
    with pytest.raises(InvariantViolated, match="would write"):
        pool.require_writable(block, COMPUTE_A)


def test_a_block_that_a_remote_write_may_reach_is_not_allocated_again() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1, RECEIVER_A)
    pool.quarantine(blocks, RECEIVER_A)
    assert pool.counts().quarantined == 1
    with pytest.raises(BlockPoolExhausted):
        pool.allocate(1, COMPUTE_B)
    pool.release(blocks[0], quarantined_by(A))
    assert pool.allocate(1, COMPUTE_B) == blocks


def test_a_quarantined_block_that_the_cache_keeps_is_cached_once_the_transfer_is_over() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1, COMPUTE_A)
    pool.hold(blocks[0], SENDER_A)
    pool.hold(blocks[0], CACHE_HOLDER)
    pool.release(blocks[0], COMPUTE_A)
    pool.quarantine(blocks, SENDER_A)
    assert pool.state(blocks[0]) is BlockState.QUARANTINED
    pool.release(blocks[0], quarantined_by(A))
    assert pool.state(blocks[0]) is BlockState.CACHED


def test_a_computing_sequence_cannot_be_quarantined() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1, COMPUTE_A)
    with pytest.raises(InvariantViolated, match="only a transfer"):
        pool.quarantine(blocks, COMPUTE_A)


def test_every_allocation_is_a_new_generation() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1, COMPUTE_A)
    first = pool.generation(block)
    pool.release(block, COMPUTE_A)
    pool.allocate(1, COMPUTE_B)
    assert pool.generation(block) == first + 1


def test_the_check_notices_a_corrupted_ledger() -> None:
    pool = BlockPool(4)
    pool.allocate(1, COMPUTE_A)
    pool._free.append(BlockId(0))
    with pytest.raises(InvariantViolated, match="free list"):
        pool.check()


class Ledger(RuleBasedStateMachine):
    """The pool against the obvious model: a dict of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7)
        self.model: dict[int, set[Holder]] = {i: set() for i in range(7)}
        self.last_generation = [0] * 7

    holders = st.builds(
        Holder,
        st.sampled_from([HolderKind.COMPUTE, HolderKind.SENDER, HolderKind.RECEIVER]),
        st.sampled_from([A, B]),
    )

    @rule(count=st.integers(0, 9), holder=holders)
    def allocate(self, count: int, holder: Holder) -> None:
        free = sum(1 for held in self.model.values() if not held)
        if count > free:
            with pytest.raises(BlockPoolExhausted):
                self.pool.allocate(count, holder)
            return
        blocks = self.pool.allocate(count, holder)
        assert len(set(blocks)) == count
        for block in blocks:
            assert not self.model[block]
            self.model[block].add(holder)
            assert self.pool.generation(block) == self.last_generation[block] + 1
            self.last_generation[block] += 1

    @rule(block=st.integers(0, 6), holder=st.one_of(holders, st.just(CACHE_HOLDER)))
    def hold(self, block: int, holder: Holder) -> None:
        if not self.model[block] or holder in self.model[block]:
            with pytest.raises(InvariantViolated):
                self.pool.hold(BlockId(block), holder)
            return
        self.pool.hold(BlockId(block), holder)
        self.model[block].add(holder)

    @rule(block=st.integers(0, 6), holder=st.one_of(holders, st.just(CACHE_HOLDER)))
    def release(self, block: int, holder: Holder) -> None:
        if holder not in self.model[block]:
            with pytest.raises(InvariantViolated):
                self.pool.release(BlockId(block), holder)
            return
        self.pool.release(BlockId(block), holder)
        self.model[block].discard(holder)

    @precondition(lambda self: any(self.model.values()))
    @rule(data=st.data())
    def quarantine_or_end_it(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b, held in self.model.items() if held]))
        holder = data.draw(st.sampled_from(sorted(self.model[block], key=str)))
        if holder.kind is HolderKind.QUARANTINE:
            self.pool.release(BlockId(block), holder)
            self.model[block].discard(holder)
        elif holder.kind in (HolderKind.SENDER, HolderKind.RECEIVER):
            after = quarantined_by(holder.attempt)
            if after in self.model[block]:
                return
            self.pool.quarantine([BlockId(block)], holder)
            self.model[block] = (self.model[block] - {holder}) | {after}

    @invariant()
    def counts_agree_with_the_model(self) -> None:
        self.pool.audit()
        counts = self.pool.counts()
        assert counts.conserved
        assert counts.free == sum(1 for held in self.model.values() if not held)
        assert counts.cached == sum(1 for held in self.model.values() if held == {CACHE_HOLDER})


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedger = Ledger.TestCase
