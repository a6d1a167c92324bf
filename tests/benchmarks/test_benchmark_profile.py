"""A profile shares out the kernel's CPU time of each thread by that thread's own samples."""

from __future__ import annotations

import pytest

from benchmarks.profile_serving import NATIVE_THREADS, attribute

LINES = [
    "thread (7): compute;run (lib/threading.py:1);step (pdserve/worker/loop.py:2);linear (torch/nn.py:3) 30",
    "thread (7): compute;run (lib/threading.py:1);step (pdserve/worker/loop.py:2) 10",
    "thread (8): MainThread;wait (ray/worker.py:4) 400",
]


def test_a_thread_that_only_waits_weighs_what_the_kernel_counted() -> None:
    own_s = attribute(LINES, {7: 4.0, 8: 0.1}).own_s
    assert own_s["linear (torch/nn.py:3)"] == pytest.approx(3.0)
    assert own_s["step (pdserve/worker/loop.py:2)"] == pytest.approx(1.0)
    assert own_s["wait (ray/worker.py:4)"] == pytest.approx(0.1)


def test_inclusive_time_names_only_our_functions() -> None:
    assert attribute(LINES, {7: 4.0, 8: 0.1}).inclusive_s == {
        "step (pdserve/worker/loop.py:2)": pytest.approx(4.0)
    }


def test_threads_without_python_are_one_line() -> None:
    own_s = attribute(LINES, {7: 1.0, 8: 0.0, 9: 2.0, 10: 0.5}).own_s
    assert own_s[NATIVE_THREADS] == pytest.approx(2.5)
