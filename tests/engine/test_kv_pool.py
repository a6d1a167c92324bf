"""The pool's bytes lie where the layout says."""

from __future__ import annotations

import ctypes

import pytest
import torch

from pdserve.core.errors import ConfigError
from pdserve.core.layout import CacheGroup, GroupLayout
from pdserve.engine.kv_pool import KVPool


def layout(dtype: str = "bfloat16") -> GroupLayout:
    group = CacheGroup(name="attention", num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)
    return GroupLayout(group=group, block_tokens=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_layer_of_a_block_is_one_run_of_bytes_at_its_offset(dtype: str) -> None:
    pool = KVPool(layout(dtype), 5, "cpu")
    assert pool.tensor.shape == (5, 3, 2, 2, 4, 8)
    assert pool.tensor.is_contiguous()
    assert pool.size_bytes == pool.tensor.numel() * pool.tensor.element_size()
    pool.tensor[3, 1] = torch.randn(2, 2, 4, 8)
    raw = ctypes.string_at(pool.address + pool.layout.offset(3, 1), pool.layout.layer_bytes)
    found = torch.frombuffer(bytearray(raw), dtype=pool.tensor.dtype).view(2, 2, 4, 8)
    assert torch.equal(found, pool.tensor[3, 1])


def test_a_new_pool_holds_zeros() -> None:
    assert not KVPool(layout(), 5, "cpu").tensor.any()


def test_a_pool_without_blocks_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"memory_gib"):
        KVPool(layout(), 0, "cpu")
