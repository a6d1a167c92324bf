"""What arrives is what was sent, or it is said that it is not."""

from __future__ import annotations

import dataclasses
import threading

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pdkernels.reference import digest as reference

from kvtransfer.digests import HostDigester, SumDigester
from kvtransfer.fake import Faults
from kvtransfer.geometry import plan_route
from kvtransfer.integrity import Verifier, open_envelope, seal
from kvtransfer.protocol import NoteArrived, Outcome, Path, PathInfo, Push
from pdserve.core.errors import TransferError
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import Shard
from pdserve.core.transfer_settings import TransferSettings, Verify
from tests.support.transfer import FULL, LAYOUTS, Node, NodeMaker, Pools

NUM_BLOCKS = 24


def arrivals(node: Node) -> list[NoteArrived]:
    return [event for event in node.events.seen if isinstance(event, NoteArrived)]


def test_every_flipped_byte_is_noticed_and_nothing_else(make_node: NodeMaker) -> None:
    sender = make_node("p", backend="fake", seed=5, faults=Faults(seed=11, flip=0.3))
    receiver = make_node("d", backend="fake")
    sender.meet(receiver)
    wrong = set()
    for i in range(300):
        block = i % NUM_BLOCKS
        sender.events.terminal(sender.push("d", [block], [block], note=b"%d" % i))
        receiver.events.await_notes(i + 1)
        if not np.array_equal(sender.pools.shaped(0)[block], receiver.pools.shaped(0)[block]):
            wrong.add(b"%d" % i)
    assert {event.note for event in arrivals(receiver) if event.error} == wrong
    assert 50 < len(wrong) < 150, "bytes were flipped"


def test_a_thousand_concurrent_clean_transfers_raise_no_false_alarm(make_node: NodeMaker) -> None:
    senders = [
        make_node(f"p{i}", backend="fake", seed=i, faults=Faults(seed=i, delay_s=(0, 0.003), reorder=True))
        for i in range(5)
    ]
    receivers = [make_node(f"d{i}", backend="fake", num_blocks=5 * NUM_BLOCKS) for i in range(2)]
    for sender in senders:
        for receiver in receivers:
            sender.meet(receiver)

    def send(i: int) -> None:
        """Each sender writes blocks of its own at both receivers, some layers of 1 to 3 blocks a push."""
        rng = np.random.default_rng(i)
        for n in range(100):
            for receiver in receivers:
                begin, count = int(rng.integers(0, NUM_BLOCKS - 3)), 1 + n % 3
                blocks = list(range(begin, begin + count))
                there = [i * NUM_BLOCKS + block for block in blocks]
                senders[i].push(receiver.name, blocks, there, layers=(n % 3, 4 + n % 3))

    threads = [threading.Thread(target=send, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for receiver in receivers:
        receiver.events.await_notes(500)
        assert [event.error for event in arrivals(receiver)] == [""] * 500


def test_verification_can_be_turned_off(make_node: NodeMaker) -> None:
    for sending, receiving in ((Verify.OFF, Verify.ON), (Verify.ON, Verify.OFF)):
        sender = make_node("p", backend="fake", seed=5, faults=Faults(flip=1.0), verify=sending)
        receiver = make_node("d", backend="fake", verify=receiving)
        sender.meet(receiver)
        sender.push("d", [0], [0])
        assert receiver.events.await_notes(1) == [b"note"]
        assert arrivals(receiver)[0].error == ""
        sender.stop()
        receiver.stop()


def verifier(mode: Verify, pools: Pools) -> Verifier:
    return Verifier(pools.regions, mode)


def test_auto_verifies_slow_pairs_and_those_of_unknown_speed() -> None:
    one = verifier(Verify.AUTO, Pools(LAYOUTS, NUM_BLOCKS, seed=1))
    peer = WorkerId("d")
    assert one.digest(peer, PathInfo(path=Path.TCP, gigabytes_per_s=0.001)) is not None
    assert one.digest(peer, PathInfo(path=Path.FAKE)) is not None
    assert one.digest(peer, PathInfo(path=Path.RDMA, gigabytes_per_s=1000.0)) is None


def test_memory_of_a_gpu_is_not_verified_where_there_is_none() -> None:
    """Reading it from here would end the process: the digest must not even try."""
    pools = Pools(LAYOUTS, NUM_BLOCKS, seed=1)
    regions = [dataclasses.replace(region, address=1, device=0) for region in pools.regions]
    one = Verifier(regions, Verify.ON)
    assert one.digest(WorkerId("d"), PathInfo(path=Path.CUDA_IPC, gigabytes_per_s=0.001)) is None
    host = verifier(Verify.ON, pools)
    push, route = whole_push([0], [1]), plan_route(Shard(layout=FULL), Shard(layout=FULL))
    digest = host.digest(WorkerId("d"), PathInfo(path=Path.FAKE))
    note = seal(push, route, digest)
    assert one.open(NoteArrived(peer=WorkerId("p"), note=note)).error == ""


def of_sums(pools: Pools, mode: Verify = Verify.ON) -> Verifier:
    """As on a GPU, with the kernel's reference in its place."""
    words = [torch.from_numpy(array).view(torch.int32) for array in pools.arrays]

    def compute(words: torch.Tensor, pieces_3P: torch.Tensor, longest: int) -> torch.Tensor:
        assert longest == int(pieces_3P[1].max())
        return reference.digest_pieces(words, pieces_3P)

    return Verifier(pools.regions, mode, SumDigester(words, compute, torch))


def test_pools_on_a_gpu_are_compared_by_sums_of_their_words() -> None:
    """Scattered blocks, some layers of them, in fragments; then one byte is wrong."""
    ours, theirs = Pools(LAYOUTS, NUM_BLOCKS, seed=1), Pools(LAYOUTS, NUM_BLOCKS, seed=2)
    sender, receiver = of_sums(ours), of_sums(theirs)
    route = plan_route(Shard(layout=FULL), Shard(layout=FULL))
    assert route is not None
    push = dataclasses.replace(whole_push([7, 2, 3, 11, 0], [1, 9, 8, 20, 21]), layers=(2, 5))
    for src, dst, length in route.spans(push):
        theirs.arrays[0][dst : dst + length] = ours.arrays[0][src : src + length]
    digest = sender.digest(WorkerId("d"), PathInfo(path=Path.CUDA_IPC))
    assert digest is not None
    for fragment in route.split(push, 2 * FULL.block_bytes):
        sender.add(digest, fragment, route)
    note = NoteArrived(peer=WorkerId("p"), note=seal(push, route, digest))
    assert receiver.open(note).error == ""
    for at in (0, FULL.layer_bytes - 1):
        where = 20 * FULL.block_bytes + 3 * FULL.layer_bytes + at
        theirs.arrays[0][where] ^= 4
        assert "digest" in receiver.open(note).error
        theirs.arrays[0][where] ^= 4
    assert receiver.open(note).error == ""


def test_digests_of_two_kinds_are_not_compared() -> None:
    pools = Pools(LAYOUTS, NUM_BLOCKS, seed=1)
    push, route = whole_push([0], [1]), plan_route(Shard(layout=FULL), Shard(layout=FULL))
    digest = of_sums(pools).digest(WorkerId("d"), PathInfo(path=Path.RDMA))
    note = NoteArrived(peer=WorkerId("p"), note=seal(push, route, digest))
    assert verifier(Verify.ON, pools).open(note).error == ""


def whole_push(src: list[int], dst: list[int]) -> Push:
    return Push(
        id=1,
        peer=WorkerId("d"),
        group=0,
        src_blocks=tuple(BlockId(b) for b in src),
        dst_blocks=tuple(BlockId(b) for b in dst),
        layers=(0, 6),
        note=b"n",
        deadline=1.0,
    )


@given(data=st.binary(max_size=64))
def test_rubbish_instead_of_an_envelope_is_an_error_and_no_crash(data: bytes) -> None:
    pools = Pools(LAYOUTS, 2, seed=1)
    one = verifier(Verify.ON, pools)
    found = one.open(NoteArrived(peer=WorkerId("p"), note=data))
    if not found.error:
        assert isinstance(found.note, bytes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (2, 7),
        (2, -1),
        (0, 5),
        (3, [None]),
        (3, [24]),
        (3, [-1]),
        (3, []),
        (4, 5),
        (5, 100),
        (5, -1),
        (6, 7),
        (6, 0),
        (7, [0, 99]),
    ],
)
def test_an_envelope_that_points_outside_the_pool_is_an_error(field: int, value: object) -> None:
    pools = Pools(LAYOUTS, NUM_BLOCKS, seed=1)
    one = verifier(Verify.ON, pools)
    route = plan_route(Shard(layout=FULL), Shard(layout=FULL))
    fields = msgpack.unpackb(seal(whole_push([0], [0]), route, HostDigester(pools.regions).start()))
    fields[field] = value
    assert one.open(NoteArrived(peer=WorkerId("p"), note=msgpack.packb(fields))).error


def test_an_envelope_without_a_digest_holds_the_note_alone() -> None:
    landed = open_envelope(seal(whole_push([0], [0]), None, None), Pools(LAYOUTS, 2, seed=1).regions)
    assert (landed.note, landed.selection) == (b"n", None)
    with pytest.raises(TransferError):
        open_envelope(b"\xc1", ())


def test_a_push_in_fragments_has_one_digest_over_all_of_them(
    make_node: NodeMaker, transport: dict[str, object]
) -> None:
    sender = make_node("p", seed=5, fragment_bytes=3 * FULL.block_bytes, **transport)
    receiver = make_node("d", **transport)
    sender.meet(receiver)
    push_id = sender.push("d", list(range(20)), list(range(19, -1, -1)))
    end = sender.events.terminal(push_id)
    assert (end.outcome, end.bytes_moved) == (Outcome.COMPLETED, 20 * FULL.block_bytes)
    receiver.events.await_notes(1)
    assert [event.error for event in arrivals(receiver)] == [""]
    np.testing.assert_array_equal(receiver.pools.shaped(0)[19::-1][:20], sender.pools.shaped(0)[:20])


@pytest.mark.parametrize(("given", "wanted"), [(True, Verify.ON), (False, Verify.OFF), ("auto", Verify.AUTO)])
def test_yaml_reads_on_and_off_as_truth_values_and_they_are_understood(given: object, wanted: Verify) -> None:
    assert TransferSettings.model_validate({"verify": given}).verify is wanted
