"""Sampling that a model recommends for itself (generation_config.json)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.text.json_file import JsonObject, read_object_if_there


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """None where the model says nothing; then the server's own defaults hold."""

    temperature: float | None = None
    """0 where the file says `do_sample: false`."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def load(folder: Path) -> GenerationDefaults:
    """Read generation_config.json; what it lacks of bos and eos comes from config.json.

    Raises `CheckpointError` for a value of the wrong type or out of its range.
    """
    generation = read_object_if_there(folder / "generation_config.json")
    config = read_object_if_there(folder / "config.json")
    eos: tuple[int, ...] = ()
    bos: tuple[int, ...] = ()
    for source in (generation, config):
        if source is not None:
            eos = eos or source.get_token_ids("eos_token_id")
            bos = bos or source.get_token_ids("bos_token_id")
    first_bos = bos[0] if bos else None
    if generation is None:
        return GenerationDefaults(bos_token_id=first_bos, eos_token_ids=eos)
    greedy = generation.get_bool("do_sample") is False
    return GenerationDefaults(
        temperature=0.0 if greedy else _in_range(generation, "temperature", 0.0, 100.0),
        top_k=_at_least(generation, "top_k", 0),
        top_p=_in_range(generation, "top_p", 0.0, 1.0),
        min_p=_in_range(generation, "min_p", 0.0, 1.0),
        repetition_penalty=_in_range(generation, "repetition_penalty", 0.0, 100.0),
        max_new_tokens=_at_least(generation, "max_new_tokens", 1),
        bos_token_id=first_bos,
        eos_token_ids=eos,
    )


def _in_range(source: JsonObject, key: str, low: float, high: float) -> float | None:
    value = source.get_float(key)
    if value is not None and not low <= value <= high:
        raise source.wrong(key, f"in [{low:g}, {high:g}]")
    return value


def _at_least(source: JsonObject, key: str, low: int) -> int | None:
    value = source.get_int(key)
    if value is not None and value < low:
        raise source.wrong(key, f"at least {low}")
    return value
