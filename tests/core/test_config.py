"""One frozen tree from YAML and flags; every mistake is one line that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pdserve.core.config import RoutingPolicy, ServeConfig, load_config
from pdserve.core.errors import ConfigError


def test_flags_lie_on_top_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prefill: {workers: 3, max_num_seqs: 7}\ncoordinator: {policy: random}\n")
    config = load_config(file, {"prefill": {"workers": 2}, "decode": {}})
    assert (config.prefill.workers, config.prefill.max_num_seqs) == (2, 7)
    assert config.coordinator.policy is RoutingPolicy.RANDOM
    assert config.decode == ServeConfig().decode


def test_no_file_and_no_flags_is_the_default() -> None:
    assert load_config(None, {}) == ServeConfig()


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServeConfig().cache.block_size = 1  # type: ignore[misc]  # what the test is about


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cache: {block_sice: 3}", "cache.block_sice"),
        ("cache: {block_size: 0}", "cache.block_size"),
        ("decode: {workers: 0}", "decode.workers"),
        ("coordinator: {port: 70000}", "coordinator.port"),
        ("coordinator: {policy: best}", "coordinator.policy"),
        ("- a list", "wanted a mapping"),
        ("a: [", "--config"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(text: str, names: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert names in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml", {})


# --- several models -----------------------------------------------------------------------------------

TWO = """
model: {dtype: float32}
decode: {max_num_seqs: 8}
models:
  - {model: a, served_model_name: [one, uno], prefill: {workers: 0}}
  - model: b
    decode: {workers: 2}
    classes: {interactive: {ttft_target_ms: 300}}
"""


def two_models(tmp_path: Path, text: str = TWO, **overrides: dict[str, Any]) -> ServeConfig:
    path = tmp_path / "two.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_an_entry_begins_with_the_sections_and_has_the_last_word(tmp_path: Path) -> None:
    first, second = two_models(tmp_path).of_each_model
    assert (first.model.model, first.model.served_names, first.prefill.workers) == ("a", ("one", "uno"), 0)
    assert (second.model.model, second.model.served_names, second.prefill.workers) == ("b", (), 1)
    assert [c.model.dtype for c in (first, second)] == ["float32", "float32"]
    assert [(c.decode.workers, c.decode.max_num_seqs) for c in (first, second)] == [(1, 8), (2, 8)]
    assert first.models == second.models == ()


def test_one_model_is_its_own_list() -> None:
    config = ServeConfig()
    assert config.of_each_model == (config,)


def test_a_resolved_configuration_of_several_models_reads_as_itself(tmp_path: Path) -> None:
    config = two_models(tmp_path)
    assert ServeConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        (TWO, {"model": {"model": "c"}}, "give model.model (or --model) or models, not both"),
        (TWO + "  - {model: d, color: red}", {}, "models.2.color: Extra inputs are not permitted"),
        (
            TWO + "  - {model: d, default_class: gold}",
            {},
            "models.2.default_class: 'gold' is none of batch, ",
        ),
        ("coordinator: {default_class: gold}", {}, "default_class: 'gold' is none of the classes"),
        ("coordinator: {classes: {a: {tpot_target_ms: 9, tokens_per_second: 9}}}", {}, "not both"),
        ("coordinator: {tenants: {a: {weight: 0}}}", {}, "coordinator.tenants.a.weight: Input should be"),
        ("coordinator: 3", {"coordinator": {"classes.a.priority": 1}}, "coordinator: wanted a mapping"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(
    tmp_path: Path, text: str, overrides: dict[str, dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        two_models(tmp_path, text, **overrides)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dotted_override_reaches_into_a_class_and_leaves_the_rest(tmp_path: Path) -> None:
    text = "coordinator: {classes: {gold: {ttft_target_ms: 100}}}"
    config = two_models(tmp_path, text, coordinator={"classes.gold.priority": -2})
    gold = config.coordinator.classes["gold"]
    assert (gold.ttft_target_ms, gold.priority) == (100, -2)
