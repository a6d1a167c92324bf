from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.protocol import Outcome, Push, PushEnded
from pdserve.core.ids import AttemptId, BlockId, RequestId, WorkerId
from pdserve.engine.block_pool import BlockPool, BlockState, Holder, HolderKind
from pdserve.worker.pushes import PushBook
from prefill.pushes import blocks_to_push

ATTEMPT = AttemptId(RequestId("r"), 0)
COMPUTE = Holder(HolderKind.COMPUTE, ATTEMPT)


def push(push_id: int, *blocks: BlockId) -> Push:
    return Push(
        id=push_id,
        peer=WorkerId("decode-0"),
        group=0,
        src_blocks=blocks,
        dst_blocks=blocks,
        layers=(0, 1),
        note=b"",
        deadline=1.0,
    )


def ended(push_id: int, outcome: Outcome = Outcome.COMPLETED, seconds: float = 0.0) -> PushEnded:
    return PushEnded(id=push_id, outcome=outcome, bytes_moved=10, seconds=seconds)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(4)


def test_a_block_is_held_until_the_last_push_that_reads_it_ends(pool: BlockPool) -> None:
    first, second = pool.allocate(2, COMPUTE)
    book = PushBook(pool, ATTEMPT)
    book.submitted(push(0, first), 10)
    book.submitted(push(1, first, second), 20)
    pool.release_all([first, second], COMPUTE)
    book.ended(ended(0), 3.0)
    assert pool.state(first) is BlockState.HELD
    book.ended(ended(1), 5.0)
    assert pool.num_free == 4
    assert book.settled
    assert (book.num_submitted, book.bytes_planned, book.bytes_moved) == (2, 30, 20)
    assert book.last_end == 5.0


def test_busy_time_is_what_the_transfer_thread_measured_not_when_it_was_heard(pool: BlockPool) -> None:
    (block,) = pool.allocate(1, COMPUTE)
    book = PushBook(pool, ATTEMPT)
    book.submitted(push(0, block), 1)
    book.submitted(push(1, block), 1)
    book.ended(ended(0, seconds=0.25), 2.0)
    book.ended(ended(1, seconds=0.5), 2.0)
    book.submitted(push(2, block), 1)
    book.ended(ended(2, seconds=1.0), 21.0)
    assert book.busy_s == 1.75


def test_a_push_past_its_deadline_quarantines_its_blocks_until_it_is_terminal(pool: BlockPool) -> None:
    first, second = pool.allocate(2, COMPUTE)
    book = PushBook(pool, ATTEMPT)
    book.submitted(push(0, first), 1)
    book.submitted(push(1, first, second), 1)
    pool.release_all([first, second], COMPUTE)
    book.ended(ended(0, Outcome.TIMED_OUT), 1.0)
    assert book.error is not None
    assert [pool.state(b) for b in (first, second)] == [BlockState.QUARANTINED, BlockState.HELD]
    book.ended(ended(1, Outcome.TIMED_OUT), 1.0)
    assert pool.counts().quarantined == 2
    book.ended(ended(1, Outcome.FAILED), 2.0)
    assert [pool.state(b) for b in (first, second)] == [BlockState.QUARANTINED, BlockState.FREE]
    assert not book.settled
    book.ended(ended(0), 3.0)
    assert pool.num_free == 4
    pool.audit()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 70), block_tokens=st.integers(1, 9))
def test_the_chunks_of_a_prompt_push_every_block_once_and_nothing_cached(
    data: st.DataObject, num_tokens: int, block_tokens: int
) -> None:
    full = (num_tokens - 1) // block_tokens
    src_cached, dst_cached = (data.draw(st.integers(0, full)) * block_tokens for _ in range(2))
    sent: list[int] = list(
        blocks_to_push(
            start=0, end=src_cached, final=False, dst_cached_tokens=dst_cached, block_tokens=block_tokens
        )
    )
    at = src_cached
    while at < num_tokens:
        end = min(num_tokens, at + data.draw(st.integers(1, 4)) * block_tokens)
        chunk = blocks_to_push(
            start=at,
            end=end,
            final=end == num_tokens,
            dst_cached_tokens=dst_cached,
            block_tokens=block_tokens,
        )
        sent += chunk
        at = end
    assert len(chunk) > 0, "the last chunk always has a block to carry the hand-over"
    assert sent == list(range(dst_cached // block_tokens, -(-num_tokens // block_tokens)))
