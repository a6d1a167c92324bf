"""Reading the JSON files of a model directory, where anything may be missing, broken or of another type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pdserve.core.errors import CheckpointError

MAX_JSON_BYTES = 256 * 2**20
"""Far above any real file (a large tokenizer.json has 35 MB); a bound for hostile ones."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A JSON object that remembers its file, so that every complaint names file, key and expectation.

    A key whose value is `null` counts as absent, as Hugging Face writes its defaults.
    """

    file: str
    data: Mapping[str, object]

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def get_int(self, key: str) -> int | None:
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        return value

    def get_float(self, key: str) -> float | None:
        value = self.data.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def get_bool(self, key: str) -> bool | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def get_str(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def get_object(self, key: str) -> JsonObject | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonObject(f"{self.file}: {key}", cast("dict[str, object]", value))

    def get_list(self, key: str) -> list[object] | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def get_token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one integer, as a list, or not at all."""
        value = self.data.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise self.wrong(key, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))

    def positive_int(self, key: str) -> int:
        value = self.get_int(key)
        if value is None or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        """The error for a key whose value cannot be used."""
        found = repr(self.data[key]) if key in self.data else "nothing"
        shown = found if len(found) <= 80 else found[:77] + "..."
        return CheckpointError(f"{self.file}: {key} must be {wanted}, found {shown}")


def read_object(path: Path) -> JsonObject:
    """Parse a file that must hold one JSON object. Raises `CheckpointError` for anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, at most {MAX_JSON_BYTES} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, found {type(value).__name__}")
    return JsonObject(str(path), value)


def read_object_if_there(path: Path) -> JsonObject | None:
    """`read_object`, or None where the file does not exist."""
    return read_object(path) if path.exists() else None
