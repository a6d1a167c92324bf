"""What every backend promises, through the service that drives it."""

from __future__ import annotations

import random
import time

import numpy as np
import psutil
import pytest

from kvtransfer.fake import Faults
from kvtransfer.protocol import Outcome, Path, TransferEvent
from pdserve.core.errors import InvariantViolated, TransferError
from tests.support.transfer import FULL, POISON, WINDOW, Node, NodeMaker

Pair = tuple[Node, Node]


def expect(receiver: Node, group: int, moved: dict[tuple[int, int], np.ndarray]) -> None:
    """The receiver's pool holds `moved` ((block, layer) -> bytes) and poison everywhere else."""
    wanted = np.full_like(receiver.pools.shaped(group), POISON)
    for (block, layer), data in moved.items():
        wanted[block, layer] = data
    np.testing.assert_array_equal(receiver.pools.shaped(group), wanted)


def source(sender: Node, group: int, src: list[int], dst: list[int], layers: range) -> dict:
    data = sender.pools.shaped(group)
    return {(d, layer): data[s, layer] for s, d in zip(src, dst, strict=True) for layer in layers}


def test_whole_blocks_land_where_they_were_sent_and_nowhere_else(pair: Pair) -> None:
    sender, receiver = pair
    src, dst = [3, 4, 5, 9, 0, 23], [7, 8, 9, 1, 20, 0]
    end = sender.events.terminal(sender.push("decode-0", src, dst))
    assert end.outcome is Outcome.COMPLETED, end.error
    assert end.bytes_moved == 6 * FULL.block_bytes
    assert receiver.events.await_notes(1) == [b"note"]
    expect(receiver, 0, source(sender, 0, src, dst, range(6)))
    expect(receiver, 1, {})


@pytest.mark.parametrize("layers", [(0, 1), (5, 6), (2, 5)])
def test_a_push_of_some_layers_leaves_the_others_alone(pair: Pair, layers: tuple[int, int]) -> None:
    sender, receiver = pair
    src, dst = [1, 2, 8], [4, 5, 0]
    sender.events.terminal(sender.push("decode-0", src, dst, layers=layers))
    receiver.events.await_notes(1)
    expect(receiver, 0, source(sender, 0, src, dst, range(*layers)))


def test_each_cache_group_moves_in_its_own_geometry(pair: Pair) -> None:
    sender, receiver = pair
    end = sender.events.terminal(sender.push("decode-0", [2, 3], [23, 22], group=1, layers=(0, 2)))
    receiver.events.await_notes(1)
    assert end.bytes_moved == 2 * WINDOW.block_bytes
    expect(receiver, 1, source(sender, 1, [2, 3], [23, 22], range(2)))
    expect(receiver, 0, {})


def test_a_note_is_seen_only_after_its_bytes(make_node: NodeMaker, transport: dict) -> None:
    sender, receiver = make_node("p", seed=1, **transport), make_node("d", **transport)
    wrong = []

    def check(event: object) -> None:
        note = getattr(event, "note", None)
        if note is not None:
            block = note[0]
            if not np.array_equal(receiver.pools.shaped(0)[block], sender.pools.shaped(0)[block]):
                wrong.append(block)
        receiver.events(event)  # type: ignore[arg-type]

    receiver.service._on_event = check
    sender.meet(receiver)
    for block in range(24):
        sender.push("d", [block], [block], note=bytes([block]))
    assert sorted(receiver.events.await_notes(24)) == [bytes([b]) for b in range(24)]
    assert wrong == []


@pytest.mark.parametrize("size", [0, 1, 300, 100_000])
def test_notes_of_any_bytes_and_size_arrive_unchanged(pair: Pair, size: int) -> None:
    sender, receiver = pair
    note = random.Random(size).randbytes(size)
    sender.push("decode-0", [0], [0], note=note)
    assert receiver.events.await_notes(1) == [note]


def test_both_sides_push_to_each_other(pair: Pair) -> None:
    sender, receiver = pair
    receiver.meet(sender)
    original = sender.pools.shaped(0)[2].copy()
    ends = [sender.push("decode-0", [2], [3]), receiver.push("prefill-0", [9], [9])]
    assert sender.events.terminal(ends[0]).outcome is Outcome.COMPLETED
    assert receiver.events.terminal(ends[1]).outcome is Outcome.COMPLETED
    sender.events.await_notes(1)
    receiver.events.await_notes(1)
    np.testing.assert_array_equal(receiver.pools.shaped(0)[3], original)
    assert (sender.pools.shaped(0)[9] == POISON).all()


def test_four_workers_that_meet_all_at_once_push_all_at_once(make_node: NodeMaker, transport: dict) -> None:
    nodes = [make_node(f"w{i}", seed=i, **transport) for i in range(4)]
    before = [node.pools.shaped(0).copy() for node in nodes]
    pairs = [(a, b) for a in nodes for b in nodes if a is not b]
    for a, b in pairs:
        a.service.connect(b.name, b.epoch, b.fingerprint, b.backend.metadata)
    sent = []
    for a, b in pairs:  # block i of every pool is written by worker i alone, from a block nobody writes
        i = nodes.index(a)
        sent.append((a, a.push(b.name, [10 + i], [i])))
    for a, push_id in sent:
        assert a.events.terminal(push_id).outcome is Outcome.COMPLETED
    for a, b in pairs:
        b.events.await_notes(3)
        i = nodes.index(a)
        np.testing.assert_array_equal(b.pools.shaped(0)[i], before[i][10 + i])


def test_a_push_to_an_unknown_peer_fails(make_node: NodeMaker, transport: dict) -> None:
    node = make_node("p", seed=1, **transport)
    end = node.events.terminal(node.push("nobody", [0], [0]))
    assert end.outcome is Outcome.FAILED
    assert "nobody" in end.error


def test_a_push_after_disconnect_fails_and_reaches_nothing(pair: Pair) -> None:
    sender, receiver = pair
    sender.service.disconnect(receiver.name)
    end = sender.events.terminal(sender.push("decode-0", [0], [0]))
    assert end.outcome is Outcome.FAILED
    expect(receiver, 0, {})


@pytest.mark.parametrize(
    ("src", "dst", "layers", "group"),
    [
        ([24], [0], (0, 6), 0),
        ([-1], [0], (0, 6), 0),
        ([0], [24], (0, 6), 0),
        ([0], [-1], (0, 6), 0),
        ([0, 1], [0], (0, 6), 0),
        ([], [], (0, 6), 0),
        ([0], [0], (0, 7), 0),
        ([0], [0], (3, 3), 0),
        ([0], [0], (0, 6), 2),
        ([0], [0], (0, 6), 1),
    ],
)
def test_a_push_outside_the_pools_fails_alone(
    pair: Pair, src: list[int], dst: list[int], layers: tuple[int, int], group: int
) -> None:
    sender, receiver = pair
    end = sender.events.terminal(sender.push("decode-0", src, dst, layers=layers, group=group))
    assert end.outcome is Outcome.FAILED
    assert end.error
    good = sender.push("decode-0", [1], [1])
    assert sender.events.terminal(good).outcome is Outcome.COMPLETED
    receiver.events.await_notes(1)
    expect(receiver, 0, source(sender, 0, [1], [1], range(6)))
    assert sender.events.failed_peers == []


def test_a_fingerprint_mismatch_is_refused_before_the_first_byte(
    make_node: NodeMaker, transport: dict
) -> None:
    sender, other = make_node("p", seed=1, **transport), make_node("d", model="other", **transport)
    sender.service.connect(other.name, 1, other.fingerprint, other.backend.metadata)
    sender.events.until(lambda: sender.events.failed_peers == ["d"], "refusal")
    assert "model" in sender.events.seen[-1].error  # type: ignore[union-attr]
    assert sender.events.terminal(sender.push("d", [0], [0])).outcome is Outcome.FAILED
    expect(other, 0, {})


def test_metadata_that_does_not_belong_to_the_peer_is_refused(make_node: NodeMaker, transport: dict) -> None:
    sender, other = make_node("p", seed=1, **transport), make_node("d", **transport)
    sender.service.connect(other.name, 2, other.fingerprint, other.backend.metadata)
    sender.service.connect(other.name, 1, other.fingerprint, b"\xc1 rubbish")
    sender.service.connect(other.name, 1, other.fingerprint, b"")
    sender.events.until(lambda: len(sender.events.failed_peers) == 3, "three refusals")


def test_connecting_twice_answers_twice(pair: Pair) -> None:
    sender, receiver = pair
    sender.service.connect(receiver.name, 1, receiver.fingerprint, receiver.backend.metadata)
    sender.events.until(lambda: len(sender.events.connected) == 2, "second answer")
    assert sender.events.terminal(sender.push("decode-0", [0], [0])).outcome is Outcome.COMPLETED


def test_a_restarted_peer_is_met_again_under_its_new_epoch(
    make_node: NodeMaker, transport: dict, pair: Pair
) -> None:
    sender, old = pair
    sender.events.terminal(sender.push("decode-0", [0], [0]))
    old_metadata = old.backend.metadata
    old.stop()
    new = make_node("decode-0", epoch=2, **transport)
    sender.meet(new)
    assert sender.events.terminal(sender.push("decode-0", [5], [6])).outcome is Outcome.COMPLETED
    new.events.await_notes(1)
    expect(new, 0, source(sender, 0, [5], [6], range(6)))
    sender.service.disconnect(new.name, epoch=1)  # late news of the old process
    assert sender.events.terminal(sender.push("decode-0", [1], [1])).outcome is Outcome.COMPLETED
    sender.events.seen.clear()
    sender.service.connect(old.name, 1, old.fingerprint, old_metadata)  # so is this
    assert sender.events.terminal(sender.push("decode-0", [2], [2])).outcome is Outcome.COMPLETED
    assert sender.events.failed_peers == []
    assert sender.events.connected == []


@pytest.mark.parametrize("met", ["before it was asked for", "while it waited"])
def test_a_push_meant_for_an_earlier_process_of_a_peer_fails_and_writes_nothing(
    make_node: NodeMaker, transport: dict, pair: Pair, met: str
) -> None:
    sender, old = pair
    old.stop()
    new = make_node("decode-0", epoch=2, **transport)
    if met == "before it was asked for":
        sender.meet(new)
        end = sender.events.terminal(sender.push("decode-0", [0], [0], peer_epoch=1))
    else:
        sender.service.connect(new.name, new.epoch, new.fingerprint, new.backend.metadata)
        end = sender.events.terminal(sender.push("decode-0", [0], [0], peer_epoch=1))
        sender.events.await_connected(new.name, new.epoch)
    assert end.outcome is Outcome.FAILED
    assert "epoch 1" in end.error
    assert sender.events.failed_peers == []
    assert (
        sender.events.terminal(sender.push("decode-0", [5], [6], peer_epoch=2)).outcome is Outcome.COMPLETED
    )
    expect(new, 0, source(sender, 0, [5], [6], range(6)))


def test_pushes_to_one_peer_are_bounded_and_still_all_arrive(make_node: NodeMaker, transport: dict) -> None:
    sender = make_node("p", seed=3, max_inflight_bytes=FULL.block_bytes, **transport)
    receiver = make_node("d", **transport)
    sender.meet(receiver)
    ids = [sender.push("d", [b, (b + 1) % 24], [b, (b + 1) % 24], note=bytes([b])) for b in range(24)]
    assert {sender.events.terminal(i).outcome for i in ids} == {Outcome.COMPLETED}
    receiver.events.await_notes(24)
    np.testing.assert_array_equal(receiver.pools.arrays[0], sender.pools.arrays[0])


def test_stopping_with_work_in_flight_ends_every_push_once(pair: Pair) -> None:
    sender, _ = pair
    ids = [sender.push("decode-0", [b % 24], [b % 24]) for b in range(100)]
    sender.stop()
    assert sender.events.await_stopped().error == ""
    for push_id in ids:
        assert len([e for e in sender.events.of_push(push_id) if e.terminal]) == 1
    with pytest.raises(TransferError):
        sender.push("decode-0", [0], [0])


def test_a_push_to_a_peer_that_stopped_fails_and_others_still_work(
    make_node: NodeMaker, transport: dict, pair: Pair
) -> None:
    sender, gone = pair
    third = make_node("decode-1", **transport)
    sender.meet(third)
    gone.stop()
    outcomes = []
    while Outcome.FAILED not in outcomes:  # a transport may need a push or two to notice
        assert len(outcomes) < 100
        outcomes.append(sender.events.terminal(sender.push("decode-0", [0], [0])).outcome)
    end = sender.events.terminal(sender.push("decode-0", [0], [0]))
    assert end.outcome is Outcome.FAILED
    assert sender.events.terminal(sender.push("decode-1", [4], [4])).outcome is Outcome.COMPLETED
    third.events.await_notes(1)
    expect(third, 0, source(sender, 0, [4], [4], range(6)))


def test_the_same_id_cannot_live_twice(make_node: NodeMaker) -> None:
    sender = make_node("p", backend="fake", seed=1, faults=Faults(loss=1.0))
    receiver = make_node("d", backend="fake")
    sender.meet(receiver)
    first = sender.push("d", [0], [0])
    sender._ids = iter([first])
    with pytest.raises(InvariantViolated):
        sender.push("d", [0], [0])


def test_the_path_says_how_the_bytes_really_go(make_node: NodeMaker, transport: dict, pair: Pair) -> None:
    sender, receiver = pair
    info = sender.backend.path(receiver.name)
    if transport.get("ucx"):
        assert info.path is Path.TCP
    elif transport["backend"] == "nixl":
        assert info.path is Path.SHM
    else:
        assert info.path == transport["backend"]
        return
    assert info.gigabytes_per_s is not None
    assert info.latency_s is not None
    assert 0.05 < info.gigabytes_per_s < 1000
    assert 0 < info.latency_s < 1


def test_two_thousand_pushes_leave_no_descriptor_behind(pair: Pair) -> None:
    sender, receiver = pair
    for round_of in range(20):
        ids = [sender.push("decode-0", [i % 24], [(i + 1) % 24], note=b"%d" % i) for i in range(100)]
        for push_id in ids:
            assert sender.events.terminal(push_id).outcome is Outcome.COMPLETED
        receiver.events.await_notes(100)
        if round_of == 0:
            before = num_descriptors(), resident_bytes()
        sender.events.seen.clear()
        receiver.events.seen.clear()
    after = num_descriptors(), resident_bytes()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + (24 << 20)
    assert sender.service._live == {}
    assert sender.service._queues == {}


def num_descriptors() -> int:
    return psutil.Process().num_fds()


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_an_idle_service_sleeps_and_still_sees_a_note_within_milliseconds(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = pair
    sender.events.terminal(sender.push("decode-0", [0], [0]))
    receiver.events.await_notes(1)
    num_polls = 0
    poll = receiver.backend.poll

    def counted(now: float) -> list[TransferEvent]:
        nonlocal num_polls
        num_polls += 1
        return poll(now)

    monkeypatch.setattr(receiver.backend, "poll", counted)
    latencies = []
    for i in range(15):
        time.sleep(0.04)  # the idle time that is measured
        began = time.perf_counter()
        sender.push("decode-0", [0], [0], note=b"%d" % i)
        receiver.events.await_notes(i + 2)
        latencies.append(time.perf_counter() - began)
    assert sorted(latencies)[7] < 0.01, latencies  # a wait of IDLE_WAIT_S would show
    assert num_polls < 15 * 25, "it polls on a timer"
