"""Byte arithmetic of blocks, and fingerprints that disagree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import FingerprintMismatch
from pdserve.core.layout import CacheGroup, Fingerprint, GroupLayout, blocks_for

GROUP = CacheGroup(name="full", num_layers=3, num_kv_heads=2, head_dim=8, dtype="bfloat16")
ONE_OF_TWO = replace(GROUP, num_kv_heads=1, total_kv_heads=2)
ONE_OF_FOUR = replace(GROUP, num_kv_heads=1, total_kv_heads=4)
LAYOUT = GroupLayout(group=GROUP, block_tokens=16)
PRINT = Fingerprint(protocol=1, model="digest", layouts=(LAYOUT,))


def test_offsets_are_those_of_a_c_contiguous_array() -> None:
    pool = np.zeros(LAYOUT.pool_shape(5), dtype=np.uint16)
    base = pool.__array_interface__["data"][0]
    for block in range(5):
        for layer in range(3):
            view = pool[block, layer]
            assert view.__array_interface__["data"][0] - base == LAYOUT.offset(block, layer)
            assert view.nbytes == LAYOUT.layer_bytes
    assert pool.nbytes == 5 * LAYOUT.block_bytes


@given(st.integers(0, 10_000), st.integers(1, 256))
def test_blocks_hold_the_tokens_and_not_a_block_more(tokens: int, block_tokens: int) -> None:
    blocks = blocks_for(tokens, block_tokens)
    assert blocks * block_tokens >= tokens > (blocks - 1) * block_tokens or tokens == blocks == 0


def test_equal_fingerprints_agree_whatever_their_rank() -> None:
    PRINT.require_same(replace(PRINT, tp_rank=0), peer="decode-0")


@pytest.mark.parametrize(("size", "rank"), [(2, 0), (2, 1), (4, 3), (8, 5)])
def test_ranks_that_divide_the_heads_or_replicate_them_agree(size: int, rank: int) -> None:
    other = replace(PRINT, layouts=(replace(LAYOUT, group=ONE_OF_TWO),), tp_size=size, tp_rank=rank)
    PRINT.require_same(other, peer="decode-0")
    other.require_same(PRINT, peer="prefill-0")


def test_blocks_of_another_size_can_be_transferred_but_not_served_together() -> None:
    other = replace(PRINT, layouts=(replace(LAYOUT, block_tokens=32),))
    PRINT.require_transferable(other, peer="decode-0")
    with pytest.raises(FingerprintMismatch, match="block_size"):
        PRINT.require_same(other, peer="decode-0")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (replace(PRINT, protocol=2), "protocol"),
        (replace(PRINT, model="another"), "model"),
        (replace(PRINT, layouts=()), "layouts"),
        (replace(PRINT, layouts=(replace(LAYOUT, block_tokens=32),)), "block_size"),
        (replace(PRINT, layouts=(replace(LAYOUT, group=replace(GROUP, dtype="float32")),)), "full.dtype"),
        (replace(PRINT, layouts=(replace(LAYOUT, group=replace(GROUP, head_dim=4)),)), "full.head_dim"),
        (replace(PRINT, layouts=(replace(LAYOUT, group=replace(GROUP, num_layers=4)),)), "full.num_layers"),
        (replace(PRINT, tp_size=2), "full.total_kv_heads"),
        (replace(PRINT, layouts=(replace(LAYOUT, group=ONE_OF_FOUR),), tp_size=2), "full.total_kv_heads"),
        (
            replace(PRINT, layouts=(replace(LAYOUT, group=ONE_OF_TWO),), tp_size=4, tp_rank=4),
            "full.num_kv_heads",
        ),
        (replace(PRINT, layouts=(replace(LAYOUT, group=ONE_OF_TWO),)), "full.num_kv_heads"),
    ],
)
def test_a_disagreement_names_the_field_and_both_values(other: Fingerprint, field: str) -> None:
    with pytest.raises(FingerprintMismatch, match=f"decode-0 has {field}=") as caught:
        PRINT.require_same(other, peer="decode-0")
    assert caught.value.field == field
    assert not caught.value.retryable
