"""Tensors of a safetensors checkpoint, one file or many, mapped and read only when asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pdserve.core.errors import CheckpointError, MissingTensor, ShapeMismatch
from pdserve.models.files import write_json
from pdserve.text.json_file import read_object

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4096


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...


class _Shard(Protocol):
    """What is used of `safetensors.safe_open`, whose own stubs have no types."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Checkpoint:
    """Opened once, closed when the weights are loaded. Tensors stay valid after `close`.

    A tensor is a private map of its file: nothing is read before it is touched, and pages can be dropped.
    """

    def __init__(self, folder: Path, shards: Mapping[str, _Shard], files: Mapping[str, Path]) -> None:
        self._folder = folder
        self._shards = dict(shards)
        self._files = dict(files)
        self._digest: str | None = None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open every shard and read the headers. Raises `CheckpointError` for a missing or broken file,
        `MissingTensor` for one that the index promises and its shard does not hold."""
        weight_map = _weight_map(folder)
        if weight_map is None:
            path = folder / SINGLE
            shard = _open_shard(path)
            names = list(shard.keys())
            return cls(folder, dict.fromkeys(names, shard), dict.fromkeys(names, path))
        shards = {file: _open_shard(folder / file) for file in sorted(set(weight_map.values()))}
        held = {file: frozenset(shard.keys()) for file, shard in shards.items()}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise MissingTensor(name, str(folder / file))
        return cls(
            folder,
            {name: shards[file] for name, file in weight_map.items()},
            {name: folder / file for name, file in weight_map.items()},
        )

    @property
    def folder(self) -> str:
        return str(self._folder)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    @property
    def total_bytes(self) -> int:
        return sum(self.size_bytes(name) for name in self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `MissingTensor`."""
        return tuple(self._shard(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises `MissingTensor`, or `CheckpointError` for a type that torch does not have."""
        code = self._shard(name).get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self._files[name]}: tensor {name!r} has the unknown type {code}")
        return _DTYPES[code]

    def size_bytes(self, name: str) -> int:
        """For progress: the bytes that loading this tensor reads. Raises `MissingTensor`."""
        return self.dtype(name).itemsize * math.prod(self.shape(name))

    def get(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU, mapped. Raises `MissingTensor`."""
        shard = self._shard(name)
        try:
            return shard.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self._files[name]}: tensor {name!r} cannot be read: {error}") from error

    def require(self, name: str, shape: Sequence[int]) -> Tensor:
        """`get`, after checking the shape. Raises `MissingTensor` or `ShapeMismatch`."""
        found = self.shape(name)
        if found != tuple(shape):
            raise ShapeMismatch(name, str(self._files[name]), tuple(shape), found)
        return self.get(name)

    @property
    def digest(self) -> str:
        """Tells models apart, in milliseconds: 32 hex digits over config, headers and samples of the weights.

        The samples are there because a fine-tuned model has the config and headers of its base.
        """
        if self._digest is None:
            self._digest = _digest(self._folder, sorted(set(self._files.values())))
        return self._digest

    def close(self) -> None:
        """Let go of the files. Calling it twice does nothing."""
        for shard in {id(shard): shard for shard in self._shards.values()}.values():
            shard.__exit__(None, None, None)
        self._shards.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shard(self, name: str) -> _Shard:
        shard = self._shards.get(name)
        if shard is None:
            raise MissingTensor(name, str(self._folder))
        return shard


def save_checkpoint(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / SINGLE, {"format": "pt"})


def stored_dtype(folder: Path) -> str | None:
    """bfloat16, float16 or float32 as the first tensor is stored; None where there are no weights to see."""
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        return None
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    with Checkpoint.open(folder) as checkpoint:
        kinds = (names.get(checkpoint.dtype(name)) for name in sorted(checkpoint.names))
        return next((kind for kind in kinds if kind is not None), None)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor to shard as the index says, or None where the checkpoint is one file."""
    path = folder / INDEX
    if not path.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: no weights; wanted {SINGLE} or {INDEX} with its shards")
        return None
    entries = read_object(path).get_object("weight_map")
    if entries is None or not entries.data:
        raise CheckpointError(f"{path}: weight_map must name a shard for every tensor, found nothing")
    weight_map: dict[str, str] = {}
    for name in entries.data:
        file = entries.get_str(name)
        if file is None or Path(file).name != file:
            raise entries.wrong(name, "the name of a file beside the index")
        weight_map[name] = file
    return weight_map


def _open_shard(path: Path) -> _Shard:
    if not path.is_file():
        raise CheckpointError(f"{path}: the shard is missing; download the checkpoint again")
    try:
        return cast(_Shard, safe_open(path, framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from error


def _digest(folder: Path, files: Sequence[Path]) -> str:
    hasher = hashlib.sha256()
    config = folder / "config.json"
    hasher.update(config.read_bytes() if config.exists() else b"")
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header = int.from_bytes(start, "little")
            hasher.update(start + file.read(header))
            data = size - header - 8
            for sample in range(_SAMPLES):
                file.seek(8 + header + data * sample // _SAMPLES)
                hasher.update(file.read(_SAMPLE_BYTES))
    return hasher.hexdigest()[:32]
