"""A checkpoint is copied to a machine's own disk once, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.core.errors import CheckpointError
from pdserve.models.local_copy import local_copy

_COPY = """
import sys; from pathlib import Path; from pdserve.models.local_copy import local_copy
said = []
print(local_copy(Path(sys.argv[1]), Path(sys.argv[2]), said.append))
print(sum("copying" in words for words in said))
"""


def checkpoint(folder: Path) -> Path:
    source = folder / "tiny"
    (source / "sub").mkdir(parents=True)
    (source / "model.safetensors").write_bytes(os.urandom(100_000))
    (source / "sub" / "config.json").write_text("{}")
    (source / "linked.json").symlink_to(source / "sub" / "config.json")
    return source


def silent(_: str) -> None:
    pass


def test_the_copy_has_every_file_and_is_made_once(tmp_path: Path) -> None:
    source, folder = checkpoint(tmp_path), tmp_path / "disk" / "models"
    said: list[str] = []
    copy = local_copy(source, folder, said.append)
    assert said
    for name in ("model.safetensors", "sub/config.json", "linked.json"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
        assert not (copy / name).is_symlink()
    said.clear()
    before = (copy / "model.safetensors").stat()
    assert local_copy(source, folder, said.append) == copy
    assert said == []
    assert (copy / "model.safetensors").stat().st_ino == before.st_ino


def test_a_changed_checkpoint_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    first = local_copy(source, tmp_path / "disk", silent)
    (source / "model.safetensors").write_bytes(b"other")
    second = local_copy(source, tmp_path / "disk", silent)
    assert first != second
    assert (second / "model.safetensors").read_bytes() == b"other"


def test_processes_that_start_together_copy_once(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", _COPY, str(source), str(tmp_path / "disk")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    answers = [start.communicate(timeout=60)[0].split() for start in starts]
    assert len({path for path, _ in answers}) == 1
    assert sum(int(copied) > 0 for _, copied in answers) == 1


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    copy = local_copy(source, tmp_path / "disk", silent)
    partial = copy.with_name(f".{copy.name}.partial")
    shutil.copytree(copy, partial)
    shutil.rmtree(copy)
    (partial / "left-over").write_text("half")
    assert sorted(path.name for path in local_copy(source, tmp_path / "disk", silent).iterdir()) == [
        "linked.json",
        "model.safetensors",
        "sub",
    ]
    assert not partial.exists()


def test_a_disk_without_room_or_a_place_without_a_folder_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.local_dir"):
        local_copy(source, tmp_path / "file", silent)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="GB free"):
        local_copy(source, tmp_path / "disk", silent)
    assert [path for path in (tmp_path / "disk").iterdir() if path.is_dir()] == []
