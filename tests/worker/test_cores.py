"""Workers lend their cores while they are idle, and have them back at the next step."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from pdcpu.library import HelperCore

from pdserve.worker.cores import CoreLender, CoreShare

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")


def on_a_thread(work: Callable[[], None]) -> None:
    """Affinity belongs to a thread: this one's must stay as it is."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def two_cores() -> tuple[int, int]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    return cores[0], cores[1]


def lenders(board: Path, threads: list[int]) -> tuple[CoreLender, CoreLender]:
    first, second = two_cores()
    prefill = CoreShare(board=board, index=0, cores=(first,), others=((1, (second,)),), borrows=True)
    decode = CoreShare(board=board, index=1, cores=(second,), others=((0, (first,)),), borrows=False)
    return CoreLender(prefill, threads.append), CoreLender(decode, threads.append)


def test_a_borrower_uses_the_cores_of_an_idle_lender_and_gives_them_back(tmp_path: Path) -> None:
    threads: list[int] = []
    first, second = two_cores()

    def work() -> None:
        prefill, decode = lenders(tmp_path / "cores", threads)
        prefill.enter()
        assert os.sched_getaffinity(0) == {first, second}
        decode.enter()
        assert os.sched_getaffinity(0) == {first, second}, "the lender changes nothing of the borrower's step"
        prefill.enter()
        assert os.sched_getaffinity(0) == {first}
        decode.leave()
        prefill.enter()
        assert os.sched_getaffinity(0) == {first, second}

    on_a_thread(work)
    assert threads == [2, 1, 2]


def test_one_that_does_not_borrow_keeps_to_its_own(tmp_path: Path) -> None:
    threads: list[int] = []

    def work() -> None:
        _, decode = lenders(tmp_path / "cores", threads)
        before = os.sched_getaffinity(0)
        decode.enter()
        assert os.sched_getaffinity(0) == before

    on_a_thread(work)
    assert threads == []


def test_a_core_with_a_busy_second_owner_is_not_lent(tmp_path: Path) -> None:
    first, second = two_cores()
    board = tmp_path / "cores"
    threads: list[int] = []

    def work() -> None:
        shared = ((1, (second,)), (2, (second,)))
        prefill = CoreLender(
            CoreShare(board=board, index=0, cores=(first,), others=shared, borrows=True), threads.append
        )
        other = CoreLender(
            CoreShare(board=board, index=2, cores=(second,), others=(), borrows=False), threads.append
        )
        other.enter()
        prefill.enter()
        other.leave()
        prefill.enter()

    on_a_thread(work)
    assert threads == [2]


def test_a_successor_clears_what_its_dead_predecessor_left(tmp_path: Path) -> None:
    threads: list[int] = []

    def work() -> None:
        prefill, decode = lenders(tmp_path / "cores", threads)
        decode.enter()  # and dies
        prefill.enter()
        assert threads == []
        lenders(tmp_path / "cores", threads)
        prefill.enter()

    on_a_thread(work)
    assert threads == [2]


def test_core_numbers_may_be_indices_into_what_a_process_may_use() -> None:
    share = CoreShare(board=Path("b"), index=0, cores=(0, 1), others=((1, (2, 3)),), borrows=True)
    placed = share.among({4, 6, 9})
    assert placed.cores == (4, 6)
    assert placed.others == ((1, (4, 9)),)


def test_helpers_of_our_own_kernels_stand_on_every_core_and_look_at_its_owners(tmp_path: Path) -> None:
    first, second = two_cores()
    board = tmp_path / "cores"
    others = ((1, (second,)), (3, (second, 77)))
    given: list[Sequence[HelperCore]] = []
    threads: list[int] = []

    def work() -> None:
        share = CoreShare(board=board, index=0, cores=(first, 55), others=others, borrows=True)
        prefill = CoreLender(share, threads.append, given.append)
        decode = CoreLender(CoreShare(board=board, index=3, cores=(second,), others=(), borrows=False), print)
        keeps_to_its_own: list[Sequence[HelperCore]] = []
        CoreLender(dataclasses.replace(share, others=()), threads.append, keeps_to_its_own.append)
        assert [helper.cpu for helper in keeps_to_its_own[0]] == [55]
        helpers = {helper.cpu: helper.owners for helper in given[0]}
        assert {core: len(owners) for core, owners in helpers.items()} == {55: 0, second: 2, 77: 1}
        busy = ctypes.c_uint8.from_address(helpers[77][0])
        assert busy.value == 0
        decode.enter()
        assert busy.value == 1
        prefill.enter()
        assert os.sched_getaffinity(0) == {first}, "the compute thread leaves the other cores to the helpers"
        decode.leave()
        assert busy.value == 0
        del busy
        prefill.close()

    on_a_thread(work)
    assert threads == [1]
    assert list(given[-1]) == []
