"""What the coordinator makes of workers that are several ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.fleet import WorkerState
from pdserve.core.messages import Role
from tests.support.model_workers import LAYOUT, worker_info


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_a_tokens_kv_is_as_large_however_many_ranks_hold_it(ranks: int, heads: int) -> None:
    info = worker_info("decode-0", Role.DECODE)
    group = replace(LAYOUT.group, num_kv_heads=heads, total_kv_heads=4)
    layout = replace(LAYOUT, group=group)
    print_of_first = replace(info.fingerprint, layouts=(layout,), tp_size=ranks)
    state = WorkerState(info=replace(info, fingerprint=print_of_first), model="m")
    assert state.kv_token_bytes == 2 * 2 * 4 * group.token_head_bytes  # layers, K and V, heads
