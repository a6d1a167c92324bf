"""Block gather and scatter are copies: equality is exact, and nothing outside the window changes."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import blocks as reference

from tests.support.kernels import int32_bits

blocks = pytest.importorskip("pdkernels.blocks", exc_type=ImportError)

SHAPES = [
    ((5, 3, 2, 4, 8, 16), range(3), range(4)),
    ((5, 3, 2, 4, 8, 16), range(1, 2), range(2, 4)),
    ((4, 2, 2, 3, 3, 5), range(2), range(1, 2)),  # rows of an odd number of elements
    ((2, 1, 2, 2, 64, 128), range(1), range(2)),  # several programs a row
]


@pytest.mark.parametrize(("shape", "layers", "heads"), SHAPES)
def test_gather_packs_the_window_in_order(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], layers: range, heads: range
) -> None:
    pool = torch.randn(shape, device=device).to(dtype)
    for ids in ([], [1], [1, 0, 1]):
        index = torch.tensor(ids, dtype=torch.int32, device=device)
        found = blocks.gather_blocks(pool, index, layers=layers, heads=heads)
        assert torch.equal(found, reference.gather_blocks(pool, index, layers, heads))


@pytest.mark.parametrize(("shape", "layers", "heads"), SHAPES)
def test_scatter_writes_the_window_and_nothing_else(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], layers: range, heads: range
) -> None:
    pool = torch.randn(shape, device=device).to(dtype)
    wanted = pool.clone()
    index = torch.tensor([1, 0], dtype=torch.int32, device=device)
    packed = torch.randn(2, len(layers), 2, len(heads), *shape[4:], device=device).to(dtype)
    reference.scatter_blocks(packed, wanted, index, layers, heads)
    blocks.scatter_blocks(packed, pool, index, layers=layers, heads=heads)
    assert torch.equal(pool, wanted)


def test_every_bit_pattern_is_copied_as_it_is(device: str) -> None:
    pool = int32_bits((3, 1, 2, 1, 4, 4), device).view(torch.float32)
    index = torch.tensor([2, 1], dtype=torch.int32, device=device)
    found = blocks.gather_blocks(pool, index)
    assert torch.equal(found.view(torch.int32), pool.view(torch.int32)[[2, 1]])


def test_halves_of_two_ranks_make_the_pool_of_one(device: str) -> None:
    whole = torch.randn(4, 2, 2, 4, 8, 16, device=device)
    ranks = [whole[:, :, :, :2].contiguous(), whole[:, :, :, 2:].contiguous()]
    received = torch.empty_like(whole)
    index = torch.arange(4, dtype=torch.int32, device=device)
    for rank, pool in enumerate(ranks):
        packed = blocks.gather_blocks(pool, index)
        blocks.scatter_blocks(packed, received, index, heads=range(2 * rank, 2 * rank + 2))
    assert torch.equal(received, whole)


def test_inputs_a_kernel_cannot_take_are_named(device: str) -> None:
    pool = torch.zeros(3, 2, 2, 2, 4, 4, device=device)
    index = torch.tensor([0], dtype=torch.int32, device=device)
    for argument, call in {
        "block_ids": lambda: blocks.gather_blocks(pool, index.long()),
        "pool": lambda: blocks.gather_blocks(pool[:, :, :, ::2], index),
        "heads": lambda: blocks.gather_blocks(pool, index, heads=range(1, 3)),
        "layers": lambda: blocks.gather_blocks(pool, index, layers=range(0, 2, 2)),
        "packed": lambda: blocks.scatter_blocks(pool, pool, index),
    }.items():
        with pytest.raises(KernelInputError) as error:
            call()
        assert error.value.argument == argument
