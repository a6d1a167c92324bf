"""generation_config.json: what the model recommends, and values that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.core.errors import CheckpointError
from pdserve.text.generation_defaults import GenerationDefaults, load


def folder_with(tmp_path: Path, **files: object) -> Path:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_a_model_that_says_nothing_recommends_nothing(tmp_path: Path) -> None:
    assert load(tmp_path) == GenerationDefaults()


def test_stated_values_are_read(tmp_path: Path) -> None:
    stated = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0}
    stated |= {"repetition_penalty": 1.05, "max_new_tokens": 2048, "bos_token_id": 1, "eos_token_id": [2, 3]}
    assert load(folder_with(tmp_path, generation_config=stated)) == GenerationDefaults(
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.0,
        repetition_penalty=1.05,
        max_new_tokens=2048,
        bos_token_id=1,
        eos_token_ids=(2, 3),
    )


def test_a_model_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, generation_config={"do_sample": False, "temperature": 0.7})
    assert load(folder).temperature == 0.0


def test_ends_come_from_config_where_generation_config_has_none(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, config={"eos_token_id": 7, "bos_token_id": 5}, generation_config={})
    assert (load(folder).eos_token_ids, load(folder).bos_token_id) == ((7,), 5)


@pytest.mark.parametrize(
    "stated",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 1.5},
        {"top_k": -1},
        {"top_p": 2},
        {"eos_token_id": "x"},
        {"eos_token_id": [[1]]},
        {"do_sample": 1},
        {"max_new_tokens": 0},
    ],
)
def test_a_value_that_cannot_be_is_a_typed_error(tmp_path: Path, stated: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(stated))):
        load(folder_with(tmp_path, generation_config=stated))
