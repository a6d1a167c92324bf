"""A step: which logits come back, when layers are announced, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdserve.core.config import CacheSettings, DType, ModelSettings
from pdserve.core.errors import InvariantViolated
from pdserve.core.ids import BlockId
from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.engine.build import Engine, build_engine
from pdserve.models.llama import group_ends

BLOCK = 4


@pytest.fixture
def engine(tiny_dir: Path) -> Engine:
    return build_engine(
        tiny_dir,
        ModelSettings(dtype=DType.FLOAT32, max_model_len=40),
        CacheSettings(block_size=BLOCK, num_blocks=32),
        device="cpu",
        num_threads=None,
    )


def piece(
    tokens: list[int], start: int = 0, first_block: int = 0, logits: Logits = Logits.LAST
) -> SequenceSlice:
    count = -(-(start + len(tokens)) // BLOCK)
    blocks = [BlockId(first_block + i) for i in range(count)]
    return SequenceSlice(tokens=tokens, start=start, blocks=blocks, logits=logits)


def test_rows_come_back_in_slice_order_as_each_slice_asks(engine: Engine) -> None:
    slices = {
        "none": piece([3, 4, 5], first_block=0, logits=Logits.NONE),
        "last": piece([6, 7, 8, 9, 10], first_block=4, logits=Logits.LAST),
        "all": piece([11, 12, 13], first_block=8, logits=Logits.ALL),
    }
    alone = {name: engine.runner.forward([s]) for name, s in slices.items()}
    assert {name: len(rows) for name, rows in alone.items()} == {"none": 0, "last": 1, "all": 3}
    together = engine.runner.forward(list(slices.values()))
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, torch.cat([alone["last"], alone["all"]]), rtol=1e-4, atol=1e-4)


def test_what_a_former_user_left_in_a_block_never_reaches_the_next_one(engine: Engine) -> None:
    steps = [piece([3, 4, 5, 6, 7, 8]), piece([9], start=6), piece([10], start=7), piece([11], start=8)]
    clean = [engine.runner.forward([step]) for step in steps]
    engine.runner.pools[0].tensor.fill_(float("nan"))
    assert all(
        torch.equal(engine.runner.forward([step]), want) for step, want in zip(steps, clean, strict=True)
    )


def test_each_group_of_layers_is_announced_when_its_kv_is_in_the_pool(engine: Engine) -> None:
    pool = engine.runner.pools[0].tensor
    engine.runner.forward([piece([3, 4, 5, 6, 7])])
    want = pool[:2].clone()
    pool.zero_()
    seen: list[tuple[int, int]] = []

    def done(first: int, last: int) -> None:
        seen.append((first, last))
        torch.testing.assert_close(pool[:2, first:last], want[:, first:last])
        assert not pool[:2, last:].any()

    engine.runner.forward([piece([3, 4, 5, 6, 7])], layer_groups=2, on_layers_done=done)
    assert seen == [(0, 1), (1, 3)]


@pytest.mark.parametrize("layers", [1, 2, 3, 30, 31])
@pytest.mark.parametrize("groups", [1, 2, 4, 64])
def test_layer_groups_cover_all_layers_evenly(layers: int, groups: int) -> None:
    ends = group_ends(layers, groups)
    sizes = [last - first for first, last in zip((0, *ends), ends, strict=False)]
    assert sum(sizes) == layers
    assert len(sizes) == min(groups, layers)
    assert max(sizes) - min(sizes) <= 1


def test_only_the_blocks_of_the_step_are_written(engine: Engine) -> None:
    pool = engine.runner.pools[0].tensor
    pool.fill_(7.0)
    engine.runner.forward([piece([3] * 6, first_block=5)])
    touched = {int(block) for block in (pool != 7.0).flatten(1).any(dim=1).nonzero()}
    assert touched == {5, 6}
    # The second block holds two of its four tokens; what was behind them is gone.
    assert bool((pool[6, :, :, :, 2:] == 0.0).all())
    pool[6, :, :, :, 3:] = 7.0
    engine.runner.forward([piece([4], start=6, first_block=5)])
    assert bool((pool[6, :, :, :, 3:] == 7.0).all()), "a block that was begun before is not cleared again"


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [SequenceSlice(tokens=[], start=0, blocks=[BlockId(0)])],
        [SequenceSlice(tokens=[3] * (BLOCK + 1), start=0, blocks=[BlockId(0)])],
        [SequenceSlice(tokens=[3], start=40, blocks=[BlockId(i) for i in range(11)])],
        [SequenceSlice(tokens=[3], start=0, blocks=[BlockId(32)])],
        [SequenceSlice(tokens=[3], start=0, blocks=[BlockId(-1)])],
        [SequenceSlice(tokens=[160], start=0, blocks=[BlockId(0)])],
    ],
    ids=[
        "no_slices",
        "no_tokens",
        "too_few_blocks",
        "past_the_context",
        "no_such_block",
        "negative",
        "token",
    ],
)
def test_a_slice_that_cannot_be_is_refused_before_anything_is_written(
    engine: Engine, wrong: list[SequenceSlice]
) -> None:
    with pytest.raises(InvariantViolated):
        engine.runner.forward(wrong)
    assert not engine.runner.pools[0].tensor.any()
