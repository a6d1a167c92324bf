"""The arithmetic of pushes, and what peers tell each other."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.geometry import Route, plan_route
from kvtransfer.metadata import (
    METADATA_VERSION,
    PeerMetadata,
    RemotePool,
    decode_metadata,
    encode_metadata,
    fingerprint_digest,
    meet,
)
from kvtransfer.protocol import Push
from kvtransfer.spans import require_regions
from pdserve.core.errors import ConfigError, FingerprintMismatch, TransferError
from pdserve.core.ids import BlockId, WorkerId
from pdserve.core.layout import Shard
from tests.support.transfer import FULL, LAYOUTS, WINDOW, Pools, fingerprint


def same_shape() -> Route:
    route = plan_route(Shard(layout=FULL), Shard(layout=FULL))
    assert route is not None
    return route


ROUTE = same_shape()


def push(src: list[int], dst: list[int], layers: tuple[int, int]) -> Push:
    return Push(
        id=1,
        peer=WorkerId("d"),
        group=0,
        src_blocks=tuple(BlockId(b) for b in src),
        dst_blocks=tuple(BlockId(b) for b in dst),
        layers=layers,
        note=b"",
        deadline=1.0,
    )


@given(
    blocks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12),
    layers=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: (min(p), max(p) + 1)),
)
def test_merged_spans_move_the_same_bytes_as_single_layers(
    blocks: list[tuple[int, int]], layers: tuple[int, int]
) -> None:
    one = push([a for a, _ in blocks], [b for _, b in blocks], layers)
    spans = ROUTE.spans(one)
    unit = FULL.layer_bytes
    merged = [(src + i, dst + i) for src, dst, length in spans for i in range(0, length, unit)]
    layer_range = range(*layers)
    plain = [(FULL.offset(a, layer), FULL.offset(b, layer)) for a, b in blocks for layer in layer_range]
    assert merged == plain
    assert sum(length for _, _, length in spans) == ROUTE.size_bytes(one)


@given(
    blocks=st.lists(st.integers(0, 1000), min_size=1, max_size=20),
    layers=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: (min(p), max(p) + 1)),
)
def test_units_name_each_layer_of_each_block(blocks: list[int], layers: tuple[int, int]) -> None:
    src, dst = ROUTE.units(push(blocks, blocks[::-1], layers))
    assert dst.tolist() == [b * 6 + layer for b in blocks[::-1] for layer in range(*layers)]
    assert src.tolist() == [b * 6 + layer for b in blocks for layer in range(*layers)]


def test_neighbouring_whole_blocks_become_one_span() -> None:
    assert ROUTE.spans(push([3, 4, 5], [8, 9, 10], (0, 6))) == [
        (3 * FULL.block_bytes, 8 * FULL.block_bytes, 3 * FULL.block_bytes)
    ]
    assert len(ROUTE.spans(push([3, 4], [8, 9], (0, 5)))) == 2


def test_pools_that_differ_from_the_fingerprint_are_refused() -> None:
    pools = Pools(LAYOUTS, 4, seed=None)
    require_regions(pools.regions, fingerprint())
    with pytest.raises(ConfigError, match="cache groups"):
        require_regions(pools.regions[:1], fingerprint())
    short = dataclasses.replace(pools.regions[0], num_blocks=5)
    with pytest.raises(ConfigError, match="full"):
        require_regions((short, pools.regions[1]), fingerprint())


def metadata(**changes: object) -> PeerMetadata:
    whole = PeerMetadata(
        transport="nixl",
        worker=WorkerId("d"),
        epoch=3,
        host="h",
        rdma=True,
        agent="d@3",
        agent_metadata=b"\x00\xff",
        pools=(RemotePool(address=1 << 47, num_blocks=7, device=None),) * 2,
        scratch=RemotePool(address=4096, num_blocks=1, device=0),
        fingerprint=fingerprint_digest(fingerprint()),
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_metadata_survives_the_wire() -> None:
    assert decode_metadata(encode_metadata(metadata())) == metadata()
    assert decode_metadata(encode_metadata(metadata(scratch=None))) == metadata(scratch=None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb(7),
        msgpack.packb([METADATA_VERSION]),
        msgpack.packb([METADATA_VERSION + 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        msgpack.packb([METADATA_VERSION, "nixl", "d", 1, "", "", b"", [[None, 1, None]], None, ""]),
        encode_metadata(metadata())[:-5],
    ],
)
def test_unreadable_metadata_is_a_transfer_error(data: bytes) -> None:
    with pytest.raises(TransferError):
        decode_metadata(data)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"transport": "local"}, FingerprintMismatch),
        ({"worker": WorkerId("x")}, TransferError),
        ({"epoch": 2}, TransferError),
        ({"fingerprint": "0"}, FingerprintMismatch),
        ({"pools": ()}, FingerprintMismatch),
    ],
)
def test_a_peer_that_is_not_what_it_should_be_is_refused(
    changes: dict[str, object], error: type[Exception]
) -> None:
    meet(fingerprint(), WorkerId("d"), 3, fingerprint(), encode_metadata(metadata()), "nixl")
    with pytest.raises(error):
        meet(fingerprint(), WorkerId("d"), 3, fingerprint(), encode_metadata(metadata(**changes)), "nixl")


def test_the_digest_covers_every_field_of_a_fingerprint() -> None:
    base = fingerprint()
    others = [
        fingerprint("other"),
        fingerprint(layouts=(FULL,)),
        fingerprint(layouts=(WINDOW, FULL)),
        dataclasses.replace(base, tp_rank=1),
        dataclasses.replace(base, tp_size=2),
        dataclasses.replace(base, protocol=base.protocol + 1),
    ]
    assert len({fingerprint_digest(f) for f in [base, *others]}) == len(others) + 1
