"""Recorded traffic: Azure's 2023 LLM traces (CSV) and Mooncake's (JSON lines with prefix-block hashes)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from pdserve.core.errors import ConfigError

MOONCAKE_BLOCK_TOKENS: Final = 512
"""What one entry of hash_ids stands for (Qin et al., FAST 2025)."""
_AZURE_COLUMNS: Final = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    at_s: float
    """Since the first request."""
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """One per block of `MOONCAKE_BLOCK_TOKENS`: equal ids are equal tokens with equal tokens before them."""


def read_trace(path: Path, *, limit: int | None = None) -> list[TraceRow]:
    """Rows in order of time. Raises `ConfigError` with file and line for what cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = (
                _read_mooncake(path, file, limit)
                if path.suffix == ".jsonl"
                else _read_azure(path, file, limit)
            )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}: {error}") from error
    if not rows:
        raise ConfigError(f"trace {path}: holds no requests")
    rows.sort(key=lambda row: row.at_s)
    return rows


def _read_azure(path: Path, file: Iterable[str], limit: int | None) -> list[TraceRow]:
    reader = csv.DictReader(file)
    if not set(reader.fieldnames or ()) >= _AZURE_COLUMNS:
        raise ConfigError(
            f"trace {path}: wanted columns {', '.join(sorted(_AZURE_COLUMNS))}, or a .jsonl file"
        )
    rows: list[TraceRow] = []
    start: datetime | None = None
    for line in reader:
        try:
            # Seven decimals; datetime takes six.
            at = datetime.fromisoformat(line["TIMESTAMP"][:26])
            start = start or at
            rows.append(
                _row((at - start).total_seconds(), line["ContextTokens"], line["GeneratedTokens"], ())
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trace {path}, line {reader.line_num}: {error}") from error
        if len(rows) == limit:
            break
    return rows


def _read_mooncake(path: Path, file: Iterable[str], limit: int | None) -> list[TraceRow]:
    rows: list[TraceRow] = []
    start_ms: float | None = None
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            start_ms = float(entry["timestamp"]) if start_ms is None else start_ms
            at_s = (float(entry["timestamp"]) - start_ms) / 1e3
            hashes = tuple(int(block) for block in entry.get("hash_ids", ()))
            rows.append(_row(at_s, entry["input_length"], entry["output_length"], hashes))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"trace {path}, line {number}: {type(error).__name__}: {error}") from error
        if len(rows) == limit:
            break
    return rows


def _row(at_s: float, input_tokens: object, output_tokens: object, hashes: tuple[int, ...]) -> TraceRow:
    row = TraceRow(
        at_s=at_s, input_tokens=int(str(input_tokens)), output_tokens=int(str(output_tokens)), hash_ids=hashes
    )
    if row.input_tokens < 0 or row.output_tokens < 0:
        raise ValueError("negative length")
    return row
