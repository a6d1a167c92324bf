"""Between other tensor-parallel sizes and block sizes KV lands head for head and token for token."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.geometry import Route, plan_route
from kvtransfer.protocol import NoteArrived, Outcome, Push
from pdserve.core.errors import TransferError
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import CacheGroup, GroupLayout, Shard, blocks_for
from tests.support.transfer import POISON, Node, NodeMaker, fingerprint

NUM_LAYERS, HEAD_DIM = 3, 4
TOKEN_BYTES = HEAD_DIM * 2


def shards(total_heads: int, ranks: int, block_tokens: int) -> list[Shard]:
    group = CacheGroup(
        name="kv",
        num_layers=NUM_LAYERS,
        num_kv_heads=max(1, total_heads // ranks),
        head_dim=HEAD_DIM,
        dtype="bfloat16",
        total_kv_heads=total_heads,
    )
    layout = GroupLayout(group=group, block_tokens=block_tokens)
    return [Shard(layout=layout, tp_rank=rank, tp_size=ranks) for rank in range(ranks)]


def heads_of(shard: Shard) -> list[int]:
    """By the definition, not by the code: rank r of t has its share of the heads in order."""
    total, ranks = shard.total_heads, shard.tp_size
    if ranks <= total:
        return list(range(total))[shard.tp_rank * total // ranks :][: total // ranks]
    return [shard.tp_rank // (ranks // total)]


def shaped(pool: np.ndarray, layout: GroupLayout) -> np.ndarray:
    """[block, layer, K/V, head, token, byte]"""
    heads = layout.group.num_kv_heads
    return pool.reshape(-1, NUM_LAYERS, 2, heads, layout.block_tokens, TOKEN_BYTES)


def the_kv(total_heads: int, num_tokens: int) -> np.ndarray:
    """Of the whole model: [token, layer, K/V, head, byte], random."""
    shape = (num_tokens, NUM_LAYERS, 2, total_heads, TOKEN_BYTES)
    return np.random.default_rng(num_tokens).integers(0, 256, shape, dtype=np.uint8)


def fill(pool: np.ndarray, shard: Shard, blocks: Sequence[int], first: int, kv: np.ndarray) -> None:
    view = shaped(pool, shard.layout)
    for i, token in enumerate(kv):
        at = first + i
        block, slot = blocks[at // shard.layout.block_tokens], at % shard.layout.block_tokens
        view[block, :, :, :, slot] = token[:, :, heads_of(shard)]


def push_of(src: Sequence[int], dst: Sequence[int], layers: tuple[int, int], **fields: int) -> Push:
    return Push(
        id=1,
        peer=WorkerId("d"),
        group=0,
        src_blocks=tuple(BlockId(b) for b in src),
        dst_blocks=tuple(BlockId(b) for b in dst),
        layers=layers,
        note=b"",
        deadline=1.0,
        **fields,
    )


def pool_for(layout: GroupLayout, num_blocks: int) -> np.ndarray:
    return np.full(num_blocks * layout.block_bytes, POISON, dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_rank_gets_its_heads_of_every_token_once_and_nothing_else(data: st.DataObject) -> None:
    total = data.draw(st.sampled_from([1, 2, 4, 8]), "heads")
    from_ranks, to_ranks = (data.draw(st.sampled_from([1, 2, 4, 8]), "ranks") for _ in range(2))
    from_size, to_size = (data.draw(st.sampled_from([2, 4, 6, 8]), "block") for _ in range(2))
    grain = int(np.gcd(from_size, to_size))
    num_tokens = data.draw(st.integers(1, 5)) * grain
    src_token = data.draw(st.integers(0, from_size // grain - 1)) * grain
    dst_token = data.draw(st.integers(0, to_size // grain - 1)) * grain
    layers = data.draw(st.sampled_from([(0, 3), (1, 2), (0, 2)]))
    src_blocks = data.draw(st.permutations(range(8)))[: blocks_for(src_token + num_tokens, from_size)]
    dst_blocks = data.draw(st.permutations(range(8)))[: blocks_for(dst_token + num_tokens, to_size)]
    push = push_of(
        src_blocks, dst_blocks, layers, src_token=src_token, dst_token=dst_token, num_tokens=num_tokens
    )
    kv = the_kv(total, num_tokens)
    for dst in shards(total, to_ranks, to_size):
        target = pool_for(dst.layout, 8)
        written = np.zeros(len(target), dtype=np.int64)
        for src in shards(total, from_ranks, from_size):
            source = pool_for(src.layout, 8)
            fill(source, src, src_blocks, src_token, kv)
            route = plan_route(src, dst)
            if route is None:
                continue
            route.require(push)
            spans = route.spans(push)
            assert sum(length for _, _, length in spans) == route.size_bytes(push)
            for a, b, length in spans:
                target[b : b + length] = source[a : a + length]
                written[b : b + length] += 1
            check_order(route, push, spans)
        wanted = pool_for(dst.layout, 8)
        fill(wanted, dst, dst_blocks, dst_token, kv)
        for layer in set(range(NUM_LAYERS)) - set(range(*layers)):
            shaped(wanted, dst.layout)[:, layer] = POISON
        np.testing.assert_array_equal(target, wanted)
        assert written.max() == 1, "a byte had two senders"


def check_order(route: Route, push: Push, spans: list[tuple[int, int, int]]) -> None:
    """The digest's order of bytes is the spans', on both sides."""
    for side, pieces in ((0, route.source(push).pieces()), (1, route.destination(push).pieces())):
        flat = [span[side] + i for span in spans for i in range(span[2])]
        assert [at + i for at, length in pieces for i in range(length)] == flat


@given(data=st.data())
def test_fragments_of_a_reshaped_push_are_the_push_again(data: st.DataObject) -> None:
    sizes = [data.draw(st.sampled_from([4, 6, 8, 16])) for _ in range(2)]
    src, dst = shards(4, 2, sizes[0])[1], shards(4, 1, sizes[1])[0]
    route = plan_route(src, dst)
    assert route is not None
    num_tokens = data.draw(st.integers(1, 20)) * route.grain_tokens
    push = push_of(
        range(blocks_for(num_tokens, sizes[0])),
        list(reversed(range(blocks_for(num_tokens, sizes[1])))),
        (0, 3),
        num_tokens=num_tokens,
    )
    parts = list(route.split(push, data.draw(st.integers(1, 4000))))
    for part in parts:
        route.require(part)
    for side in range(2):
        together = np.concatenate([route.units(part)[side] for part in parts])
        assert together.tolist() == route.units(push)[side].tolist()


@pytest.mark.parametrize("total", [1, 2, 4, 8])
@pytest.mark.parametrize(("from_ranks", "to_ranks"), list(itertools.product([1, 2, 4, 8], repeat=2)))
def test_every_head_of_every_rank_has_exactly_one_sender(total: int, from_ranks: int, to_ranks: int) -> None:
    for dst in shards(total, to_ranks, 4):
        given_heads: list[int] = []
        for src in shards(total, from_ranks, 4):
            route = plan_route(src, dst)
            if route is not None:
                ours = heads_of(src)[slice(*route.src_heads)]
                assert ours == heads_of(dst)[slice(*route.dst_heads)]
                given_heads += ours
        assert sorted(given_heads) == heads_of(dst)


def test_blocks_that_do_not_hold_the_tokens_are_refused() -> None:
    route = plan_route(shards(4, 2, 4)[0], shards(4, 1, 8)[0])
    assert route is not None
    good = push_of([0, 1, 2], [0, 1], (0, 3), num_tokens=12)
    route.require(good)
    for wrong in (
        dataclasses.replace(good, dst_blocks=good.dst_blocks[:1]),
        dataclasses.replace(good, src_blocks=good.src_blocks[:2]),
        dataclasses.replace(good, src_token=2),
        dataclasses.replace(good, dst_token=8),
        dataclasses.replace(good, num_tokens=0),
        dataclasses.replace(good, num_tokens=-4),
        dataclasses.replace(good, layers=(0, 4)),
    ):
        with pytest.raises(TransferError):
            route.require(wrong)


# --- through the backends ---------------------------------------------------------------------------

SHAPES = [(1, 2, 4), (2, 1, 4), (2, 4, 4), (4, 1, 4), (1, 4, 1), (4, 2, 2), (2, 8, 4), (8, 4, 2)]
"""Ranks that send, ranks that receive, heads in all."""


def make_ranks(make_node: NodeMaker, name: str, ranks: Sequence[Shard], **transport: object) -> list[Node]:
    nodes = []
    for shard in ranks:
        prints = dataclasses.replace(
            fingerprint(layouts=(shard.layout,)), tp_rank=shard.tp_rank, tp_size=shard.tp_size
        )
        nodes.append(make_node(f"{name}{shard.tp_rank}", prints=prints, num_blocks=16, **transport))
    return nodes


@pytest.mark.parametrize("block_sizes", [(8, 8), (4, 16)])
@pytest.mark.parametrize(("from_ranks", "to_ranks", "total"), SHAPES)
def test_workers_of_different_sizes_exchange_exactly_the_right_heads(
    make_node: NodeMaker,
    transport: dict[str, object],
    from_ranks: int,
    to_ranks: int,
    total: int,
    block_sizes: tuple[int, int],
) -> None:
    from_shards, to_shards = (
        shards(total, from_ranks, block_sizes[0]),
        shards(total, to_ranks, block_sizes[1]),
    )
    num_tokens = 32
    src_blocks = [7, 1, 2, 14, 9, 0, 5, 11][: num_tokens // block_sizes[0]]
    dst_blocks = [3, 8, 6, 2][: num_tokens // block_sizes[1]]
    kv = the_kv(total, num_tokens)
    senders = make_ranks(make_node, "p", from_shards, **transport)
    receivers = make_ranks(make_node, "d", to_shards, **transport)
    for sender, shard in zip(senders, from_shards, strict=True):
        fill(sender.pools.arrays[0], shard, src_blocks, 0, kv)
    num_notes = dict.fromkeys((r.name for r in receivers), 0)
    for (sender, src), (receiver, dst) in itertools.product(
        zip(senders, from_shards, strict=True), zip(receivers, to_shards, strict=True)
    ):
        sender.meet(receiver)
        end = sender.events.terminal(
            sender.push(receiver.name, src_blocks, dst_blocks, layers=(0, NUM_LAYERS))
        )
        if plan_route(src, dst) is None:
            assert end.outcome is Outcome.FAILED
            assert "no heads" in end.error
        else:
            assert end.outcome is Outcome.COMPLETED, end.error
            num_notes[receiver.name] += 1
    for receiver, shard in zip(receivers, to_shards, strict=True):
        receiver.events.await_notes(num_notes[receiver.name])
        assert [e.error for e in receiver.events.seen if isinstance(e, NoteArrived) and e.error] == []
        wanted = pool_for(shard.layout, 16)
        fill(wanted, shard, dst_blocks, 0, kv)
        np.testing.assert_array_equal(receiver.pools.arrays[0], wanted)
