"""What settings make of an engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pdserve.core.config import CacheSettings, DType, ModelSettings
from pdserve.core.errors import ConfigError, FingerprintMismatch
from pdserve.core.ids import BlockId
from pdserve.engine.batch import SequenceSlice
from pdserve.engine.build import CPU_POOL_BYTES, Engine, build_engine

FEW = CacheSettings(num_blocks=4)


def build(path: Path, model: ModelSettings | None = None, cache: CacheSettings = FEW) -> Engine:
    return build_engine(path, model or ModelSettings(), cache, device="cpu", num_threads=None)


def test_the_pool_has_the_blocks_or_the_memory_that_was_asked_for(tiny_dir: Path) -> None:
    assert build(tiny_dir, cache=CacheSettings(num_blocks=9)).runner.pools[0].num_blocks == 9
    sized = build(tiny_dir, cache=CacheSettings(memory_gib=0.01))
    pool = sized.runner.pools[0]
    assert 0 <= 0.01 * 2**30 - pool.size_bytes < pool.layout.block_bytes
    assert sized.num_blocks == pool.num_blocks
    default = build(tiny_dir, cache=CacheSettings())
    assert 0 <= CPU_POOL_BYTES - default.runner.pools[0].size_bytes < pool.layout.block_bytes


def test_the_context_is_what_the_checkpoint_the_user_and_the_pool_allow(tiny_dir: Path) -> None:
    assert build(tiny_dir).runner.max_model_len == 256
    assert build(tiny_dir, ModelSettings(max_model_len=100)).runner.max_model_len == 100
    assert build(tiny_dir, cache=CacheSettings(num_blocks=2)).runner.max_model_len == 128
    with pytest.raises(ConfigError, match=r"max_model_len is 300.*256"):
        build(tiny_dir, ModelSettings(max_model_len=300))
    with pytest.raises(ConfigError, match=r"needs 4 KV blocks.*the pool has 2"):
        build(tiny_dir, ModelSettings(max_model_len=200), CacheSettings(num_blocks=2))


def test_progress_rises_to_one_with_words(tiny_dir: Path) -> None:
    seen: list[tuple[float, str]] = []
    build_engine(
        tiny_dir,
        ModelSettings(),
        FEW,
        device="cpu",
        num_threads=None,
        progress=lambda fraction, words: seen.append((fraction, words)),
    )
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert all(words for _, words in seen)


def test_peers_with_another_dtype_block_size_or_weights_have_another_fingerprint(tiny_dir: Path) -> None:
    base = build(tiny_dir).fingerprint
    base.require_same(build(tiny_dir).fingerprint, peer="same")
    others = [
        build(tiny_dir, ModelSettings(dtype=DType.BFLOAT16)),
        build(tiny_dir, cache=CacheSettings(num_blocks=8, block_size=32)),
        build(tiny_dir, ModelSettings(load_format="dummy")),
    ]
    for other in others:
        with pytest.raises(FingerprintMismatch):
            base.require_same(other.fingerprint, peer="other")


def test_dummy_weights_need_nothing_but_a_config_and_are_the_same_everywhere(
    tiny_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_dir / "config.json", tmp_path)
    one, two = (build(tmp_path, ModelSettings(load_format="dummy")) for _ in range(2))
    one.fingerprint.require_same(two.fingerprint, peer="two")
    piece = SequenceSlice(tokens=[3, 4, 5], start=0, blocks=[BlockId(0)])
    logits = one.runner.forward([piece])
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0
    assert torch.equal(logits, two.runner.forward([piece]))


def test_the_number_of_threads_is_set(tiny_dir: Path) -> None:
    before = torch.get_num_threads()
    try:
        build_engine(tiny_dir, ModelSettings(), FEW, device="cpu", num_threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_with_a_local_directory_the_weights_are_those_of_the_copy_there(
    tiny_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "shared" / "tiny"
    shutil.copytree(tiny_dir, source)
    settings = ModelSettings(local_dir=str(tmp_path / "disk"))
    first = build(source, settings)
    (copy,) = [path for path in (tmp_path / "disk").iterdir() if path.is_dir()]
    assert {path.name for path in copy.iterdir()} == {path.name for path in tiny_dir.iterdir()}
    assert first.fingerprint == build(tiny_dir).fingerprint
