"""Helping threads: they take part, leave a core whose owner is busy, and come and go."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

import pytest
import torch
from pdcpu.library import HelperCore, Library

from pdserve.models.cpu_native_linear import Arena, NativeLinear


def product(library: Library) -> NativeLinear:
    return NativeLinear(library, Arena(), torch.randn(64 * 64, 256).bfloat16(), None)


def cpu_time_of_others() -> float:
    """Seconds that other threads than this one have computed."""
    own = str(threading.get_native_id())
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        if task.name != own:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                ticks += int((task / "stat").read_text().rsplit(")", 1)[1].split()[11])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_helpers_compute_until_an_owner_of_their_core_is_busy(library: Library) -> None:
    linear, x = product(library), torch.randn(64, 256)
    want = linear(x)
    busy = (ctypes.c_uint8 * 2)()
    address = ctypes.addressof(busy)
    library.set_helpers([HelperCore(None, (address, address + 1), busy)])
    before = cpu_time_of_others()
    while cpu_time_of_others() - before < 0.05:  # a helper that never comes runs into the test's limit
        assert torch.equal(linear(x), want)
    busy[1] = 1
    for _ in range(20):  # it may be in the middle of a tile
        assert torch.equal(linear(x), want)
    before = cpu_time_of_others()
    for _ in range(100):
        assert torch.equal(linear(x), want)
    assert cpu_time_of_others() - before <= 0.02
    busy[1] = 0
    before = cpu_time_of_others()
    while cpu_time_of_others() - before < 0.05:
        assert torch.equal(linear(x), want)


def test_several_threads_of_a_process_compute_at_once(library: Library) -> None:
    linear, x = product(library), torch.randn(20, 256)
    want = linear(x)
    library.set_helpers([HelperCore(None)] * 2)
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(50) if not torch.equal(linear(x), want))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        library.set_helpers([HelperCore(None)] * 1)
        library.set_helpers([])
        library.set_helpers([HelperCore(None)] * 3)
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_core_that_does_not_exist_is_no_obstacle(library: Library) -> None:
    linear, x = product(library), torch.randn(20, 256)
    want = linear(x)
    library.set_helpers([HelperCore(4095)])
    assert torch.equal(linear(x), want)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_helpers_that_were_set_are_known(library: Library, count: int) -> None:
    library.set_helpers([HelperCore(None)] * count)
    assert len(library.helpers) == count


MS = 1_000_000
QUICK = (MS, MS // 5)
"""A loop whose last tile was a helper's: the caller waited for less than the longest tile takes."""
HELD_UP = (MS, 2 * MS)
"""A loop in which a helper lost its core in the middle of a tile."""


def rests(library: Library, loops: list[tuple[int, int]]) -> list[bool]:
    now, timed = 0, []
    for shared, waited in loops:
        now += shared + waited
        timed.append((shared, waited, now))
    return library.rests_after(timed)


def test_waiting_for_a_tile_is_no_reason_to_rest(library: Library) -> None:
    assert not any(rests(library, [QUICK] * 200))


def test_a_core_that_is_lost_now_and_then_is_borrowed_on(library: Library) -> None:
    assert not any(rests(library, ([QUICK] * 30 + [HELD_UP]) * 20))


def test_helpers_rest_from_a_core_that_they_lose_all_the_time(library: Library) -> None:
    rested = rests(library, [HELD_UP] * 10)
    assert rested.index(True) == 6, "judged after 20 ms"


def test_rests_get_longer_while_nothing_changes_and_end(library: Library) -> None:
    held_up = [(MS, 19 * MS + 1)]  # each one is judged at once

    def length_of_rest(times: int) -> int:
        """Milliseconds of sharing, from the `times`-th hold-up until helpers come back."""
        loops = held_up * times + [(MS, 0)] * 5000
        rested = rests(library, loops)[times:]
        return rested.index(False)

    assert length_of_rest(1) == 99
    assert length_of_rest(3) > 3 * length_of_rest(1)
    assert length_of_rest(10) < 2001
