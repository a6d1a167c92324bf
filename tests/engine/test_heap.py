"""Freed memory stays with the process between steps."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Final

import pytest

PROGRAM: Final = """
import resource, torch
from pdserve.engine.heap import keep_heap_between_steps

def use():
    for megabytes in (20, 9, 14, 3, 20):
        torch.empty(megabytes * 2**18).fill_(1.0)

assert keep_heap_between_steps()
for _ in range(8):  # the heap grows until every size has its place
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_activations_are_not_paged_in_again() -> None:
    # A process of its own: threads that other tests left behind page in memory too.
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    # Five rounds of 66 MiB would be 84,000 pages.
    assert int(done.stdout) < 8_000
