"""How attention work is cut into programs: plain numpy on the host, once per step, shared by all layers.

Decode: each sequence's KV range is cut into items of at most `chunk` tokens, so that the device is full even
with few sequences, and one long sequence does not keep the others' slots idle. Items are ordered longest
first, because the hardware hands out programs in order. An item of a sequence with several items writes a
partial result into its slot; slots of one sequence are neighbours, and the reduction reads them.

    sequence 0 (1 item)  ───────>                      out
    sequence 1 (3 items) ───> slot 1 ─┐
                         ───> slot 2 ─┼─ log-sum-exp ─> out
                         ─>   slot 3 ─┘

The number of items is bounded by a capacity that depends on the batch size alone, so a captured graph has a
fixed grid; unused items carry sequence -1 and their programs end at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

ITEM_OVERHEAD_TOKENS: Final = 48
"""What starting a program costs, in tokens of KV it could have read."""
REDUCE_OVERHEAD_TOKENS: Final = 96
"""What the second kernel costs when any sequence is split, in the same unit."""


@dataclass(frozen=True, slots=True)
class DecodeItems:
    """Work of one decode step. C items at most, S sequences; all int32."""

    seq_C: Ints
    """Sequence of an item; -1 marks an unused one."""
    begin_C: Ints
    """First KV token (a multiple of the tile)."""
    end_C: Ints
    slot_C: Ints
    """Row of the partial buffers, in [0, C)."""
    first_slot_S1: Ints
    """Slots of sequence s are [first_slot_S1[s], first_slot_S1[s + 1]); one slot means no reduction."""


def decode_capacity(num_seqs: int, num_kv_heads: int, num_programs: int) -> int:
    """The most items a step of `num_seqs` sequences is cut into, for a device with `num_programs` slots."""
    return num_seqs + num_programs // num_kv_heads


def plan_decode(
    context_S: Ints, *, num_kv_heads: int, num_programs: int, tile: int, window: int | None = None
) -> DecodeItems:
    """Cut the contexts (tokens including the new one; 0 is a padding row) into items.

    tile: tokens a program reads per iteration. num_programs: programs the device runs at once.
    """
    last_S = context_S.astype(np.int64)
    first_S = np.zeros_like(last_S) if window is None else np.maximum(last_S - window, 0) // tile * tile
    length_S = last_S - first_S
    capacity = decode_capacity(len(context_S), num_kv_heads, num_programs)
    chunk = _choose_chunk(length_S, num_kv_heads, num_programs, tile, capacity)
    count_S = -(-length_S // chunk)
    first_slot_S1 = np.concatenate([[0], np.cumsum(count_S)])
    seq = np.repeat(np.arange(len(context_S)), count_S)
    slot = np.arange(len(seq))
    begin = first_S[seq] + (slot - first_slot_S1[seq]) * chunk
    end = np.minimum(begin + chunk, last_S[seq])
    order = np.argsort(begin - end, kind="stable")
    return DecodeItems(
        seq_C=_padded(seq[order], capacity, -1),
        begin_C=_padded(begin[order], capacity, 0),
        end_C=_padded(end[order], capacity, 0),
        slot_C=_padded(slot[order], capacity, 0),
        first_slot_S1=first_slot_S1.astype(np.int32),
    )


def _choose_chunk(
    length_S: NDArray[np.int64], num_kv_heads: int, num_programs: int, tile: int, capacity: int
) -> int:
    """The chunk with the smallest estimated time: waves of programs, bounded below by the longest item."""
    longest = int(length_S.max(initial=0))
    if longest == 0:
        return tile
    most_parts = max(1, min(longest // tile, capacity))
    # Besides a spread of sizes: the parts of the longest that fill one, two and three waves evenly.
    even = longest * (num_programs / num_kv_heads) / length_S.sum() * np.array([1, 2, 3])
    parts = np.concatenate([np.geomspace(1, most_parts, num=24), np.clip(even, 1, most_parts)])
    parts = np.unique(parts.astype(np.int64))
    chunk_P = -(-longest // (parts * tile)) * tile
    items_P = (-(-length_S[None, :] // chunk_P[:, None])).sum(axis=1)
    waves_P = -(-items_P * num_kv_heads // num_programs)
    mean_P = length_S.sum() / items_P
    cost_P = np.maximum(
        np.minimum(chunk_P, longest) + ITEM_OVERHEAD_TOKENS, waves_P * (mean_P + ITEM_OVERHEAD_TOKENS)
    )
    cost_P = cost_P + REDUCE_OVERHEAD_TOKENS * (items_P > np.count_nonzero(length_S))
    cost_P[items_P > capacity] = np.inf  # one part always fits: at most one item per sequence
    return int(chunk_P[np.argmin(cost_P)])


def _padded(values: NDArray[np.int64], size: int, fill: int) -> Ints:
    out = np.full(size, fill, dtype=np.int32)
    out[: len(values)] = values
    return out


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Query tiles of a ragged step, most KV first. int32, one entry per tile."""

    seq_I: Ints
    first_I: Ints
    """First new token of the tile, counted within its sequence's new tokens."""


def plan_prefill(length_S: Ints, start_S: Ints, *, tile_tokens: int) -> PrefillTiles:
    """Cut the new tokens of each sequence (`length_S`, after `start_S` earlier ones) into query tiles."""
    count_S = -(-length_S.astype(np.int64) // tile_tokens)
    seq = np.repeat(np.arange(len(length_S)), count_S)
    before = np.repeat(np.cumsum(count_S) - count_S, count_S)
    first = (np.arange(len(seq)) - before) * tile_tokens
    order = np.argsort(-(start_S.astype(np.int64)[seq] + first), kind="stable")
    return PrefillTiles(seq_I=seq[order].astype(np.int32), first_I=first[order].astype(np.int32))
