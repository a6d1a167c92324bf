"""Safetensors checkpoints: lazy reading, shards, and every way they can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdserve.core.errors import CheckpointError, MissingTensor, ShapeMismatch
from pdserve.models.checkpoint import Checkpoint, save_checkpoint, stored_dtype

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(8, 4, generator=generator).to(torch.bfloat16),
        "b.weight": torch.randn(3, generator=generator),
        "c.weight": torch.randn(2, 2, 2, generator=generator).to(torch.float16),
    }


def sharded(folder: Path) -> Path:
    stored = tensors()
    save_file({"a.weight": stored["a.weight"]}, folder / FIRST)
    save_file({name: stored[name] for name in ("b.weight", "c.weight")}, folder / SECOND)
    write_index(folder, {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, {"architectures": ["X"]}, tensors())
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_come_back_exactly_with_name_shape_and_type(tmp_path: Path, kind: str) -> None:
    if kind == "single":
        save_checkpoint(tmp_path, {}, tensors())
    else:
        sharded(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.names == tensors().keys()
        for name, wanted in tensors().items():
            found = checkpoint.require(name, wanted.shape)
            assert found.dtype == wanted.dtype == checkpoint.dtype(name)
            assert torch.equal(found, wanted)
            assert checkpoint.size_bytes(name) == wanted.numel() * wanted.element_size()
        assert checkpoint.total_bytes == 8 * 4 * 2 + 3 * 4 + 8 * 2


def test_a_tensor_outlives_the_checkpoint_and_closing_twice_is_harmless(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    tensor = checkpoint.get("b.weight")
    checkpoint.close()
    checkpoint.close()
    assert torch.equal(tensor, tensors()["b.weight"])


def test_a_missing_tensor_is_named(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint, pytest.raises(MissingTensor, match=r"lm_head\.weight"):
        checkpoint.require("lm_head.weight", (1,))


def test_a_wrong_shape_names_file_tensor_and_both_shapes(single: Path) -> None:
    with Checkpoint.open(single) as checkpoint, pytest.raises(ShapeMismatch) as caught:
        checkpoint.require("a.weight", (4, 8))
    for word in ("model.safetensors", "a.weight", "[8, 4]", "[4, 8]"):
        assert word in str(caught.value)


def test_no_weights_at_all_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND}.*missing"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_the_index_promises_and_its_shard_lacks_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a.weight": SECOND})
    with pytest.raises(MissingTensor, match=r"model-00002.*a\.weight"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_named(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    "start", [b"\xff" * 8, (2**62).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"]
)
def test_a_hostile_header_is_a_typed_error(single: Path, start: bytes) -> None:
    path = single / "model.safetensors"
    path.write_bytes(start + path.read_bytes()[len(start) :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(single)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], {"a.weight": 1}, {"a.weight": "../secret.safetensors"}, {"a.weight": "/etc/passwd"}],
)
def test_a_broken_index_is_a_typed_error(tmp_path: Path, weight_map: object) -> None:
    sharded(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Checkpoint.open(tmp_path)


def test_the_digest_is_stable_and_tells_a_fine_tuned_model_from_its_base(tmp_path: Path) -> None:
    base, same, tuned, renamed = (tmp_path / name for name in ("base", "same", "tuned", "renamed"))
    big = {"w": torch.zeros(512, 512)}
    save_checkpoint(base, {"a": 1}, big)
    save_checkpoint(same, {"a": 1}, big)
    save_checkpoint(tuned, {"a": 1}, {"w": torch.ones(512, 512)})
    save_checkpoint(renamed, {"a": 2}, big)
    digests = []
    for folder in (base, same, tuned, renamed):
        with Checkpoint.open(folder) as checkpoint:
            digests.append(checkpoint.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_stored_dtype_is_seen_in_the_header(tmp_path: Path) -> None:
    assert stored_dtype(tmp_path) is None
    save_checkpoint(tmp_path, {}, {"a": torch.ones(2, dtype=torch.float16)})
    assert stored_dtype(tmp_path) == "float16"
