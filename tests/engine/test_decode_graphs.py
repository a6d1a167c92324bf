"""Which steps take a graph, which graph, and what lies in its buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.core.ids import BlockId
from pdserve.engine.batch import Logits, SequenceSlice
from pdserve.engine.decode_graphs import Captured, DecodeGraphs
from pdserve.models.graph_plan import PackedInts, graph_rows, padded, padded_tables
from pdserve.models.ops import SliceMeta


def piece(tokens: int = 1, logits: Logits = Logits.LAST) -> SequenceSlice:
    return SequenceSlice(tokens=[3] * tokens, start=4, blocks=[BlockId(0), BlockId(1)], logits=logits)


class Step:
    """Answers with the tokens that were sent last, one logit a row."""

    def __init__(self, rows: int) -> None:
        self.held = torch.zeros(rows, 1)

    def fill(self, tokens: Sequence[int], slices: Sequence[SliceMeta]) -> None:
        assert len(tokens) == len(slices)
        self.held.zero_()
        self.held[: len(tokens), 0] = torch.tensor(tokens, dtype=torch.float32)

    def forward(self) -> Tensor:
        return self.held * 10


def stand_in(step: Callable[[], Tensor]) -> Captured:
    """A recording that computes the step again, into the same memory."""
    out = step()

    def replay() -> None:
        out.copy_(step())

    return Captured(out, replay)


def graphs(*sizes: int) -> DecodeGraphs:
    made = DecodeGraphs(Step, sizes, stand_in)
    made.capture(lambda *_: None)
    return made


@pytest.mark.parametrize(("rows", "wanted"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, None), (0, None)])
def test_the_smallest_graph_that_holds_the_batch_is_taken(rows: int, wanted: int | None) -> None:
    assert graph_rows(rows, (1, 4, 8)) == wanted
    assert graphs(8, 1, 4).rows_for([piece()] * rows) == wanted


@pytest.mark.parametrize(
    "slices",
    [[piece(), piece(tokens=2)], [piece(), piece(logits=Logits.NONE)], [piece(tokens=9)]],
    ids=["guessed tokens or a chunk beside", "no logits", "a chunk"],
)
def test_a_step_that_is_more_than_decoding_runs_eagerly(slices: list[SequenceSlice]) -> None:
    assert graphs(1, 4).rows_for(slices) is None


def test_before_capture_everything_runs_eagerly() -> None:
    assert DecodeGraphs(Step, (1, 4), stand_in).rows_for([piece()]) is None


def test_the_largest_graph_is_recorded_first_and_progress_is_told() -> None:
    made, told = DecodeGraphs(Step, (1, 8, 4), stand_in), []
    made.capture(lambda done, total, rows: told.append((done, total, rows)))
    assert told == [(0, 3, 8), (1, 3, 4), (2, 3, 1)]


def test_a_replay_answers_for_the_rows_that_were_sent_and_reuses_its_memory() -> None:
    made = graphs(4)
    meta = SliceMeta(offset=0, length=1, start=4, blocks=[BlockId(0), BlockId(1)])
    first = made.forward(4, [5, 6, 7], [meta] * 3)
    assert first.flatten().tolist() == [50, 60, 70]
    again = made.forward(4, [8], [meta])
    assert again.flatten().tolist() == [80]
    assert again.data_ptr() == first.data_ptr()


def test_arrays_are_packed_on_aligned_places_and_keep_their_shapes() -> None:
    packed = PackedInts.of({"a": (3,), "b": (2, 5), "c": (1,)})
    assert packed.starts == {"a": 0, "b": 4, "c": 16}
    assert packed.total == 20
    arrays = {"a": np.arange(3), "b": np.arange(10).reshape(2, 5), "c": np.array([7])}
    buffer = np.zeros(packed.total, dtype=np.int32)
    packed.fill(buffer, {name: array.astype(np.int32) for name, array in arrays.items()})
    assert buffer.tolist() == [0, 1, 2, 0, *range(10), 0, 0, 7, 0, 0, 0]
    with pytest.raises(ValueError, match="b has shape"):
        packed.fill(buffer, {**arrays, "b": np.zeros((5, 2), dtype=np.int32)})


def test_padding_rows_have_no_blocks() -> None:
    metas = [
        SliceMeta(offset=0, length=1, start=start, blocks=[BlockId(b) for b in blocks])
        for start, blocks in ((0, [9, 8]), (7, [4, 3]), (8, [6, 5, 2]))
    ]
    tables = padded_tables(metas, rows=4, width=5, block_tokens=4)
    assert tables.tolist() == [[9, 0, 0, 0, 0], [4, 3, 0, 0, 0], [6, 5, 2, 0, 0], [0] * 5]
    assert padded([1, 2], 4, -1).tolist() == [1, 2, -1, -1]
