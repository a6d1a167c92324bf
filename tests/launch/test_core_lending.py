"""Whose cores a worker may borrow."""

from __future__ import annotations

import pytest

from pdserve.cluster.placement import WorkerSlot
from pdserve.cluster.worker_specs import lenders_of
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role


def slots(num_prefill: int, num_decode: int) -> list[WorkerSlot]:
    counts = ((Role.PREFILL, num_prefill), (Role.DECODE, num_decode))
    return [
        WorkerSlot(worker=WorkerId(f"{role.value}-{i}"), role=role, index=i)
        for role, count in counts
        for i in range(count)
    ]


def lenders(borrower: str, all_slots: list[WorkerSlot]) -> set[str]:
    (slot,) = (slot for slot in all_slots if slot.worker == borrower)
    return set(lenders_of(slot, all_slots))


def test_a_prefill_worker_borrows_from_everybody_else() -> None:
    assert lenders("prefill-0", slots(2, 2)) == {"prefill-1", "decode-0", "decode-1"}


def test_one_prefill_and_one_decode_worker_borrow_from_each_other() -> None:
    assert lenders("decode-0", slots(1, 1)) == {"prefill-0"}
    assert lenders("prefill-0", slots(1, 1)) == {"decode-0"}


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(0, 2), (1, 3), (3, 2), (4, 4), (5, 1)])
def test_the_core_of_every_prefill_worker_is_lent_to_one_decode_worker(
    num_prefill: int, num_decode: int
) -> None:
    there = slots(num_prefill, num_decode)
    lent = [core for n in range(num_decode) for core in lenders(f"decode-{n}", there)]
    assert sorted(lent) == [f"prefill-{n}" for n in range(num_prefill)]
