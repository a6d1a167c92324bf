"""The host's plans cover every KV token and every query exactly once, within the grid's capacity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pdkernels.plan import decode_capacity, plan_decode, plan_prefill

contexts = st.lists(st.one_of(st.just(0), st.integers(1, 300), st.integers(1, 40_000)), max_size=40)


@given(
    contexts,
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 16, 264]),
    st.sampled_from([16, 64]),
    st.one_of(st.none(), st.integers(1, 5000)),
)
def test_decode_items_cover_each_window_once(
    context: list[int], kv_heads: int, programs: int, tile: int, window: int | None
) -> None:
    context_S = np.array(context, dtype=np.int32)
    plan = plan_decode(context_S, num_kv_heads=kv_heads, num_programs=programs, tile=tile, window=window)
    assert len(plan.seq_C) == decode_capacity(len(context), kv_heads, programs)
    used = plan.seq_C >= 0
    assert used.sum() == plan.first_slot_S1[-1]
    assert sorted(plan.slot_C[used]) == list(range(used.sum()))
    lengths = (plan.end_C - plan.begin_C)[used]
    assert all(lengths > 0)
    assert all(lengths[:-1] >= lengths[1:])
    assert not any(plan.begin_C % tile)
    for seq, tokens in enumerate(context):
        mine = used & (plan.seq_C == seq)
        slots = plan.slot_C[mine]
        order = np.argsort(slots)
        first, last = plan.first_slot_S1[seq : seq + 2]
        assert list(slots[order]) == list(range(first, last))
        begins, ends = plan.begin_C[mine][order], plan.end_C[mine][order]
        oldest = 0 if window is None else max(0, tokens - window)
        if tokens:
            assert begins[0] == oldest // tile * tile
            assert ends[-1] == tokens
            assert list(begins[1:]) == list(ends[:-1])
        else:
            assert len(begins) == 0


def test_one_long_context_is_spread_over_the_whole_device() -> None:
    plan = plan_decode(np.array([131072], dtype=np.int32), num_kv_heads=8, num_programs=264, tile=64)
    assert plan.first_slot_S1[-1] * 8 >= 0.9 * 264


def test_a_batch_that_fills_the_device_evenly_is_not_split() -> None:
    plan = plan_decode(np.full(33, 4096, dtype=np.int32), num_kv_heads=8, num_programs=264, tile=64)
    assert plan.first_slot_S1[-1] == 33


def test_one_long_context_among_short_ones_is_split_alone() -> None:
    context = np.array([32768] + [512] * 40, dtype=np.int32)
    plan = plan_decode(context, num_kv_heads=8, num_programs=264, tile=64)
    slots = np.diff(plan.first_slot_S1)
    assert slots[0] > 8
    assert all(slots[1:] == 1)


@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 3000)), max_size=20),
    st.sampled_from([1, 5, 32]),
)
def test_prefill_tiles_cover_each_query_once(slices: list[tuple[int, int]], tile_tokens: int) -> None:
    length_S = np.array([n for n, _ in slices], dtype=np.int32)
    start_S = np.array([s for _, s in slices], dtype=np.int32)
    plan = plan_prefill(length_S, start_S, tile_tokens=tile_tokens)
    for seq, length in enumerate(length_S):
        firsts = sorted(plan.first_I[plan.seq_I == seq])
        assert firsts == list(range(0, length, tile_tokens))
    kv = start_S[plan.seq_I] + plan.first_I
    assert all(kv[:-1] >= kv[1:])


@pytest.mark.parametrize("window", [None, 64])
def test_an_empty_batch_has_an_empty_plan(window: int | None) -> None:
    empty = np.zeros(0, dtype=np.int32)
    plan = plan_decode(empty, num_kv_heads=2, num_programs=4, tile=16, window=window)
    assert list(plan.seq_C) == [-1, -1]
    assert len(plan_prefill(empty, empty, tile_tokens=8).seq_I) == 0
