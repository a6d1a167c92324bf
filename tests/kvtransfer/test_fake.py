"""The fake transport: what goes wrong is chosen by the seed and the clock alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from kvtransfer.fake import FakeBackend, Faults
from kvtransfer.local import LocalHub
from kvtransfer.protocol import NoteArrived, Outcome, Push, PushEnded, TransferEvent
from pdserve.core.ids import BlockId, WorkerId
from tests.support.transfer import FULL, LAYOUTS, POISON, Pools, fingerprint


@dataclass
class Link:
    sender: FakeBackend
    receiver: FakeBackend
    source: Pools
    target: Pools

    def submit(self, push_id: int, block: int) -> None:
        self.sender.submit(
            Push(
                id=push_id,
                peer=WorkerId("d"),
                group=0,
                src_blocks=(BlockId(block),),
                dst_blocks=(BlockId(block),),
                layers=(0, 6),
                note=b"%d" % push_id,
                deadline=1e9,
            )
        )

    def run(
        self, times: Sequence[float]
    ) -> tuple[list[tuple[float, int, Outcome]], list[tuple[float, bytes]]]:
        """Ends at the sender and notes at the receiver, with the time of the poll that saw them."""
        ends, notes = [], []
        for now in times:
            ends += [(now, e.id, e.outcome) for e in pushes(self.sender.poll(now))]
            notes += [(now, e.note) for e in self.receiver.poll(now) if isinstance(e, NoteArrived)]
        return ends, notes


def pushes(events: list[TransferEvent]) -> list[PushEnded]:
    return [e for e in events if isinstance(e, PushEnded)]


def link(faults: Faults) -> Link:
    hub = LocalHub()
    source, target = Pools(LAYOUTS, 24, seed=3), Pools(LAYOUTS, 24, seed=None)
    sender = FakeBackend(hub, WorkerId("p"), 1, source.regions, fingerprint(), faults)
    receiver = FakeBackend(hub, WorkerId("d"), 1, target.regions, fingerprint(), Faults())
    sender.connect(WorkerId("d"), 1, fingerprint(), receiver.metadata)
    sender.poll(0.0)
    return Link(sender, receiver, source, target)


STEPS = [i / 10 for i in range(100)]


def test_nothing_moves_before_its_time() -> None:
    one = link(Faults(delay_s=(2.0, 2.0), gigabytes_per_s=FULL.block_bytes / 1e9))
    one.submit(1, 0)
    assert one.sender.max_wait_s(0.0) == 0.0
    ends, notes = one.run([0.0, 2.9])
    assert (ends, notes) == ([], [])
    assert one.sender.max_wait_s(2.9) == pytest.approx(0.1)
    assert (one.target.arrays[0] == POISON).all()
    ends, notes = one.run([3.0])
    assert ends == [(3.0, 1, Outcome.COMPLETED)]
    assert notes == [(3.0, b"1")]
    np.testing.assert_array_equal(one.target.shaped(0)[0], one.source.shaped(0)[0])


def test_the_same_seed_does_the_same_and_another_something_else() -> None:
    def story(seed: int) -> object:
        one = link(Faults(seed=seed, delay_s=(0, 5), reorder=True, loss=0.2, failure=0.2, duplicate=0.2))
        for i in range(24):
            one.submit(i, i)
        return one.run(STEPS)

    assert story(1) == story(1)
    assert story(1) != story(2)


def test_pushes_land_in_order_unless_reordering_is_asked_for() -> None:
    def order(reorder: bool) -> list[int]:
        one = link(Faults(seed=4, delay_s=(0, 5), reorder=reorder))
        for i in range(24):
            one.submit(i, i)
        return [push_id for _, push_id, _ in one.run(STEPS)[0]]

    assert order(reorder=False) == list(range(24))
    assert order(reorder=True) != list(range(24))
    assert sorted(order(reorder=True)) == list(range(24))


def test_a_lost_push_is_silent_until_its_peer_is_disconnected() -> None:
    one = link(Faults(loss=1.0))
    one.submit(1, 0)
    assert one.run(STEPS) == ([], [])
    assert one.sender.max_wait_s(10.0) is None
    one.sender.disconnect(WorkerId("d"), epoch=0)
    assert one.run([11.0]) == ([], [])
    one.sender.disconnect(WorkerId("d"))
    assert one.run([12.0]) == ([(12.0, 1, Outcome.FAILED)], [])
    assert (one.target.arrays[0] == POISON).all()


def test_a_failed_push_leaves_half_of_its_bytes_and_no_note() -> None:
    one = link(Faults(failure=1.0))
    one.submit(1, 5)
    ends, notes = one.run([0.0])
    assert ends == [(0.0, 1, Outcome.FAILED)]
    assert notes == []
    moved = one.target.shaped(0)[5].ravel()
    half = moved.size // 2
    np.testing.assert_array_equal(moved[:half], one.source.shaped(0)[5].ravel()[:half])
    assert (moved[half:] == POISON).all()


def test_duplicates_and_flipped_bytes_happen_when_asked_for() -> None:
    one = link(Faults(duplicate=1.0, flip=1.0))
    one.submit(1, 5)
    ends, notes = one.run([0.0])
    assert ends == [(0.0, 1, Outcome.COMPLETED)]
    assert notes == [(0.0, b"1"), (0.0, b"1")]
    assert (one.target.shaped(0)[5] != one.source.shaped(0)[5]).sum() == 1


def test_a_push_in_flight_to_a_receiver_that_closed_fails() -> None:
    one = link(Faults(delay_s=(1.0, 1.0)))
    one.submit(1, 0)
    one.run([0.0])
    one.receiver.close()
    assert pushes(one.sender.poll(2.0))[0].outcome is Outcome.FAILED
    assert (one.target.arrays[0] == POISON).all()
