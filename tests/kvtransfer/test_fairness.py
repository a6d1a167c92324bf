"""Whose turn it is when several requests send to one peer."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.fake import Faults
from kvtransfer.geometry import Route, plan_route
from kvtransfer.protocol import NoteArrived, Outcome, Push
from kvtransfer.queues import PeerQueue, Sending, fragments
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import Shard
from tests.support.transfer import FULL, NodeMaker

BLOCK = FULL.block_bytes
IDS = itertools.count(1)


def route() -> Route:
    found = plan_route(Shard(layout=FULL), Shard(layout=FULL))
    assert found is not None
    return found


ROUTE = route()


def push(flow: str, num_blocks: int) -> Push:
    blocks = tuple(BlockId(b) for b in range(num_blocks))
    return Push(
        id=next(IDS),
        peer=WorkerId("d"),
        group=0,
        src_blocks=blocks,
        dst_blocks=blocks,
        layers=(0, 6),
        note=b"",
        deadline=1.0,
        flow=flow,
    )


def add(queue: PeerQueue, flow: str, num_blocks: int, fragment_blocks: int = 2) -> Sending:
    one = push(flow, num_blocks)
    parts = fragments(one, ROUTE, fragment_blocks * BLOCK)
    sending = Sending(push=one, route=ROUTE)
    sending.fragments.extend(parts)
    queue.add(sending)
    return sending


def run(queue: PeerQueue, limit: int = 10_000) -> list[tuple[str, int]]:
    """(flow, bytes) of each fragment in the order of their starts; each ends before the next begins."""
    order = []
    while (taken := queue.take()) is not None and len(order) < limit:
        sending, fragment = taken
        queue.inflight_bytes -= fragment.size_bytes
        order.append((sending.push.flow, fragment.size_bytes))
    return order


@pytest.mark.parametrize(
    ("huge_blocks", "num_short"), [(1000, 20), (100_000 // 64, 100)], ids=["64k tokens", "100k tokens"]
)
def test_short_requests_are_done_before_a_huge_one_that_came_first(huge_blocks: int, num_short: int) -> None:
    """Blocks of 64 tokens. While the short ones are sent, the huge one has one turn in each round."""
    queue = PeerQueue(max_inflight_bytes=1 << 30, quantum_bytes=2 * BLOCK)
    add(queue, "huge", huge_blocks)
    for i in range(num_short):
        add(queue, f"short {i}", 2)
    order = [flow for flow, _ in run(queue)]
    assert order.count("huge") == huge_blocks // 2
    assert max(order.index(f"short {i}") for i in range(num_short)) <= num_short + 1
    assert queue.idle


@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), min_size=1, max_size=30),
    quantum=st.integers(1, 6),
)
def test_flows_that_still_have_something_to_send_differ_by_at_most_a_turn(
    sizes: list[tuple[int, int]], quantum: int
) -> None:
    queue = PeerQueue(max_inflight_bytes=1 << 30, quantum_bytes=quantum * BLOCK)
    total: dict[str, int] = {}
    for flow, num_blocks in sizes:
        add(queue, str(flow), num_blocks, fragment_blocks=2)
        total[str(flow)] = total.get(str(flow), 0) + num_blocks * BLOCK
    sent = dict.fromkeys(total, 0)
    slack = (2 * max(quantum, 2) + 2) * BLOCK
    for flow, size_bytes in run(queue):
        sent[flow] += size_bytes
        busy = [sent[f] for f in sent if sent[f] < total[f]]
        assert not busy or max(busy) - min(busy) <= slack
    assert sent == total


def test_pushes_of_one_flow_start_in_order() -> None:
    queue = PeerQueue(max_inflight_bytes=1 << 30, quantum_bytes=BLOCK)
    ids = [add(queue, "a", 1 + i % 3).push.id for i in range(9)]
    seen = []
    while (taken := queue.take()) is not None:
        queue.inflight_bytes -= taken[1].size_bytes
        seen.append(taken[0].push.id)
    assert list(dict.fromkeys(seen)) == ids


def test_bytes_under_way_are_bounded_and_one_fragment_always_may_go() -> None:
    queue = PeerQueue(max_inflight_bytes=3 * BLOCK, quantum_bytes=BLOCK)
    for i in range(5):
        add(queue, str(i), 1)
    assert [queue.take() is not None for _ in range(4)] == [True, True, True, False]
    tiny = PeerQueue(max_inflight_bytes=1, quantum_bytes=BLOCK)
    add(tiny, "a", 1)
    add(tiny, "b", 1)
    assert tiny.take() is not None
    assert tiny.take() is None


def test_the_last_fragment_waits_for_the_others_and_other_pushes_do_not_wait_for_it() -> None:
    queue = PeerQueue(max_inflight_bytes=1 << 30, quantum_bytes=100 * BLOCK)
    add(queue, "a", 4)
    add(queue, "b", 1)
    first = queue.take()
    assert first is not None
    first[0].under_way[-1] = first[1].size_bytes
    second = queue.take()
    assert second is not None
    assert second[0].push.flow == "b"
    assert queue.take() is None
    first[0].under_way.clear()
    third = queue.take()
    assert third is not None
    assert third[1].last


def test_a_huge_push_does_not_hold_up_short_ones(make_node: NodeMaker) -> None:
    """100 short requests behind one that takes 100 times as long as any of them, over a slow link."""
    rate = Faults(gigabytes_per_s=BLOCK / 1e9 / 0.001)  # a block each millisecond, one after another
    sender = make_node(
        "p",
        backend="fake",
        seed=1,
        num_blocks=128,
        faults=rate,
        max_inflight_bytes=2 * BLOCK,
        fragment_bytes=2 * BLOCK,
    )
    receiver = make_node("d", backend="fake", num_blocks=128)
    sender.meet(receiver)
    everything = list(range(100))
    huge = sender.push("d", everything, everything, note=b"huge", flow="huge")
    short = [sender.push("d", [100 + i % 28], [100 + i % 28], note=b"short", flow=str(i)) for i in range(100)]
    for push_id in (*short, huge):
        assert sender.events.terminal(push_id).outcome is Outcome.COMPLETED
    receiver.events.await_notes(101)
    notes = [event.note for event in receiver.events.seen if isinstance(event, NoteArrived)]
    assert notes.index(b"huge") >= 50, "most short ones were done first"
    np.testing.assert_array_equal(receiver.pools.shaped(0)[:100], sender.pools.shaped(0)[:100])


def test_a_push_cut_short_by_its_deadline_fails_without_a_note(make_node: NodeMaker) -> None:
    sender = make_node(
        "p",
        backend="fake",
        seed=1,
        faults=Faults(delay_s=(0.2, 0.2)),
        max_inflight_bytes=BLOCK,
        fragment_bytes=BLOCK,
    )
    receiver = make_node("d", backend="fake")
    sender.meet(receiver)
    push_id = sender.push("d", [0, 1, 2], [0, 1, 2], deadline_s=0.3)
    assert sender.events.terminal(push_id).outcome is Outcome.FAILED
    outcomes = [event.outcome for event in sender.events.of_push(push_id)]
    assert outcomes == [Outcome.TIMED_OUT, Outcome.FAILED]
    other = sender.push("d", [5], [5], note=b"other")
    assert sender.events.terminal(other).outcome is Outcome.COMPLETED
    assert receiver.events.await_notes(1) == [b"other"]


@given(num_blocks=st.integers(1, 40), max_bytes=st.integers(1, 20 * BLOCK))
def test_fragments_are_the_push_again(num_blocks: int, max_bytes: int) -> None:
    one = dataclasses.replace(
        push("a", num_blocks), dst_blocks=tuple(BlockId(b) for b in reversed(range(num_blocks)))
    )
    parts = list(fragments(one, ROUTE, max_bytes))
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(part.size_bytes <= max(max_bytes, BLOCK) for part in parts)
    src, dst = ROUTE.units(one)
    pieces = [ROUTE.units(part.push) for part in parts]
    assert np.concatenate([a for a, _ in pieces]).tolist() == src.tolist()
    assert np.concatenate([b for _, b in pieces]).tolist() == dst.tolist()


@pytest.mark.parametrize("backend", ["fake", "local"])
def test_a_flow_is_forgotten_when_it_has_sent_everything(make_node: NodeMaker, backend: str) -> None:
    sender = make_node("p", backend=backend, seed=1)
    receiver = make_node("d", backend=backend)
    sender.meet(receiver)
    for i in range(50):
        sender.events.terminal(sender.push("d", [0], [0], flow=str(i)))
    sender.stop()
    assert sender.service._queues == {}
    assert sender.service._whose == {}
