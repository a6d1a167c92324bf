"""A checkpoint of random weights is one that every system loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoint import write_checkpoint
from benchmarks.peers import PEERS
from benchmarks.run import _peer_of
from benchmarks.serving import SYSTEMS
from benchmarks.shapes import Shape
from pdserve.core.config import CacheSettings, ModelSettings
from pdserve.core.ids import BlockId
from pdserve.engine.batch import SequenceSlice
from pdserve.engine.build import build_engine

TINY = Shape(name="tiny", hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, ff=64, vocab=9, tied=False)


@pytest.fixture
def tokenizer_of(tmp_path: Path) -> Path:
    """A model of which only the tokenizer, and the size of its vocabulary, are taken."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_random_weights_loads_and_computes(
    tokenizer_of: Path, tmp_path: Path, tied: bool
) -> None:
    shape = replace(TINY, tied=tied)
    write_checkpoint(shape, tokenizer_of, tmp_path / "made", seed=1)
    engine = build_engine(
        tmp_path / "made", ModelSettings(), CacheSettings(num_blocks=2), device="cpu", num_threads=1
    )
    logits_RV = engine.runner.forward([SequenceSlice(tokens=[1, 299], start=0, blocks=[BlockId(0)])])
    assert logits_RV.shape == (1, 300)
    assert logits_RV.isfinite().all()
    assert (tmp_path / "made" / "tokenizer.json").read_text() == "{}"


def test_every_system_but_ours_names_the_environment_it_runs_in() -> None:
    peers = {name: _peer_of(name) for name in SYSTEMS}
    assert {name for name, peer in peers.items() if peer is None} == {"pdserve", "pdserve-colocated"}
    assert set(peers.values()) - {None} == set(PEERS)
