"""results.json and requests.csv: every figure, for programs. `read_results` is what `compare` reads."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdserve.bench.records import RequestRecord, Trial, summarise
from pdserve.bench.suite import Run
from pdserve.core.errors import ConfigError

FORMAT: Final = 1
RESULTS: Final = "results.json"
COLUMNS: Final = (
    "system", "rate", "round", "session", "turn", "class", "warmup", "intended_s", "sent_s", "done_s",
    "ttft_s", "tpot_s", "itl_p50_s", "itl_p99_s", "itl_max_s", "e2e_s", "prompt_tokens", "cached_tokens",
    "output_tokens", "met", "missed", "error", "queue_s", "prefill_s", "transfer_exposed_s", "bytes_moved",
    "transfer_path", "prefill_worker", "decode_worker", "attempts",
)  # fmt: skip

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One counted request of a results.json, as far as comparisons need it."""

    system: str
    rate: float
    round: int
    session: int
    turn: int
    intended_s: float
    met: bool
    ttft_s: float | None
    tpot_s: float | None
    itl_p99_s: float | None
    e2e_s: float | None


def write_json(run: Run, path: Path) -> None:
    document = {
        "format": FORMAT,
        "scenario": run.scenario.model_dump(mode="json", exclude={"systems": {"__all__": {"api_key"}}}),
        "environment": dataclasses.asdict(run.environment),
        "wall_s": run.wall_s,
        "systems": [dataclasses.asdict(system) for system in run.systems],
        "trials": [_trial(trial) for trial in run.trials],
        "requests": [
            dict(zip(COLUMNS, row_of(record), strict=True))
            | {"token_times_s": _rounded(record.token_times_s)}
            for trial in run.trials
            for record in trial.records
        ],
    }
    path.write_text(json.dumps(document, indent=None, separators=(",", ":")) + "\n")


def write_csv(run: Run, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for trial in run.trials:
            writer.writerows(row_of(record) for record in trial.records)


def row_of(record: RequestRecord) -> list[Cell]:
    itl = sorted(record.itl_s)
    timings = record.timings
    return [
        record.system,
        record.rate,
        record.round,
        record.session,
        record.turn,
        record.class_name,
        record.warmup,
        _short(record.intended_s),
        _short(record.sent_s),
        _short(record.done_s),
        _short(record.ttft_s),
        _short(record.tpot_s),
        _short(_quantile(itl, 0.5)),
        _short(_quantile(itl, 0.99)),
        _short(itl[-1] if itl else None),
        _short(record.e2e_s),
        record.prompt_tokens,
        record.cached_tokens,
        record.output_tokens,
        record.met,
        "+".join(record.missed()),
        record.error,
        *(
            (
                _short(timings.queue_s),
                _short(timings.prefill_s),
                _short(timings.transfer_exposed_s),
                timings.bytes_moved,
                timings.transfer_path,
                timings.prefill_worker,
                timings.decode_worker,
                timings.attempts,
            )
            if timings
            else (None,) * 8
        ),
    ]


def read_results(path: Path) -> list[Measured]:
    """The counted requests of a run's folder, or of its results.json. Raises `ConfigError`."""
    file = path / RESULTS if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"results {file}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"results {file}: not written by `pdserve bench` (format {FORMAT})")
    try:
        return list(_measured(document["requests"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"results {file}: a request lacks {error}") from error


def _measured(requests: list[dict[str, Cell]]) -> Iterator[Measured]:
    for row in requests:
        if row["warmup"]:
            continue
        yield Measured(
            system=str(row["system"]),
            rate=float(row["rate"] or 0),
            round=int(row["round"] or 0),
            session=int(row["session"] or 0),
            turn=int(row["turn"] or 0),
            intended_s=float(row["intended_s"] or 0),
            met=bool(row["met"]),
            ttft_s=_number(row["ttft_s"]),
            tpot_s=_number(row["tpot_s"]),
            itl_p99_s=_number(row["itl_p99_s"]),
            e2e_s=_number(row["e2e_s"]),
        )


def _trial(trial: Trial) -> dict[str, object]:
    summary = summarise(trial.counted, trial.wall_s)
    return {
        "system": trial.system,
        "rate": trial.rate,
        "round": trial.round,
        "started_s": _short(trial.started_s),
        "num_clipped": trial.num_clipped,
        "attainment": summary.attainment,
        "goodput": summary.goodput,
        "output_tokens_per_s": summary.output_tokens_per_s,
        **dataclasses.asdict(summary),
    }


def _number(cell: Cell) -> float | None:
    return None if cell is None else float(cell)


def _quantile(ordered: list[float], part: float) -> float | None:
    """Linear between neighbours, as numpy's default."""
    if not ordered:
        return None
    position = part * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _short(value: float | None) -> float | None:
    """To a microsecond: finer is noise."""
    return None if value is None else round(value, 6)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]
