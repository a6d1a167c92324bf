"""Freed memory stays with the process between steps."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from pdserve.engine.heap import keep_heap_between_steps


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_activations_are_not_paged_in_again() -> None:
    def use() -> None:
        for megabytes in (20, 9, 14, 3, 20):
            torch.empty(megabytes * 2**18).fill_(1.0)

    assert keep_heap_between_steps()
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    # Five rounds of 66 MiB would be 84,000 pages.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 8_000
